"""Which tile of a matrix product a program computes, chosen from what a call costs on a target.

The candidates are few; a rough model of time ranks them. `OVERRIDES` has the last word: it maps
(kernel, target, rows, outputs, columns) to a tile and a number of shares, as a tuner measured them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from qpass.runtime.target import Target


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of x by outputs by lines of weights, and how Triton runs it.

    `swap` computes the tile transposed, so that few rows of x fit the short side of the hardware's
    products and a scale of a row of weights is one register.
    """

    rows: int
    outputs: int
    lines: int
    warps: int
    stages: int
    swap: bool


OVERRIDES: dict[tuple[str, str, int, int, int], tuple[Tile, int]] = {}


def best(
    kernel: str,
    candidates: tuple[Tile, ...],
    target: Target,
    kind: str,
    shape: tuple[int, int, int],
    bits: int,
    size: int,
) -> tuple[Tile, int]:
    """The tile and the number of shares of the columns for x `[m, k]` and n outputs.

    `size` is the bytes of one element of x.
    """
    m, n, k = shape
    if (override := OVERRIDES.get((kernel, target.name, m, n, k))) is not None:
        return override
    rate = target.peak.get(kind, target.peak["fp32"]) / target.multiprocessors
    bandwidth = target.bandwidth / target.multiprocessors

    def seconds(tile: Tile, shares: int) -> float:
        tiles = math.ceil(m / tile.rows) * math.ceil(n / tile.outputs)
        width = k / shares
        moved = tile.outputs * width * bits / 8 + tile.rows * width * size
        done = 2 * tile.rows * tile.outputs * width
        # each program also fills and drains its pipeline
        one = max(moved / bandwidth, done / (0.7 * rate)) + 4e-7
        # a multiprocessor that has one program only waits for it
        waves = max(tiles * shares / target.multiprocessors, 2.0)
        spill = 0.0 if shares == 1 else 2e-6 + shares * m * n * 8 / target.bandwidth
        return math.ceil(waves) * one + spill

    def splits(tile: Tile) -> tuple[int, ...]:
        chunks = math.ceil(k / (tile.lines * 32 // bits))
        return tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or s * 2 <= chunks)

    choices = [(tile, s) for tile in candidates for s in splits(tile)]
    return min(choices, key=lambda choice: seconds(*choice))
