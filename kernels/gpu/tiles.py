"""Which tile of a matrix product a program computes, chosen from what a call costs on a target.

The candidates are few; a rough model of time ranks them. `OVERRIDES` has the last word: it maps
(kernel, target, rows, outputs, columns) to a tile and a number of shares, as a tuner measured them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from qpass._kernels.gpu.packed import Packed
from qpass.runtime.target import Target


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of x by outputs by lines of weights, and how Triton runs it.

    `spread`: x is put in the order of the weights' words first, which costs a pass over x and
    saves many small loads.
    """

    rows: int
    outputs: int
    lines: int
    warps: int
    stages: int
    spread: bool


OVERRIDES: dict[tuple[str, str, int, int, int], tuple[Tile, int]] = {}

# the largest tile whose sums 8 warps of an NVIDIA GPU hold in registers beside all else, and the
# largest where the sums of a group are held beside the total
_LARGEST = {
    "sm_90": (128 * 256, 128 * 128),
    "sm_100": (128 * 128, 128 * 128),
    "sm_120": (128 * 128, 64 * 64),
}
_USUAL = (128 * 128, 64 * 128)


# what a product on tensor cores takes at once: 16 columns, 2 of each word, or 32, 4 of each
LEAST = 8


def fit(tile: Tile, group_lines: int, target: Target) -> Tile:
    """The tile with steps that end where groups do, if they can, and with a target's stages."""
    lines = tile.lines
    if group_lines % lines:
        whole = group_lines & -group_lines
        padded = max(LEAST, 2 ** (group_lines - 1).bit_length())
        lines = min(lines, whole if whole >= LEAST else padded)
    if target.backend == "hip":
        # the compiler keeps what is not yet used in registers
        return dataclasses.replace(tile, lines=lines, warps=max(1, tile.warps // 2), stages=2)
    return dataclasses.replace(tile, lines=lines, stages=tile.stages + (lines < tile.lines))


def shared(tile: Tile, bits: int, size: int) -> int:
    """About how many bytes of shared memory a tile takes, when an element of x takes `size`."""
    columns = tile.lines * 32 // bits
    step = tile.outputs * tile.lines * 4 + tile.rows * columns * size
    return tile.stages * step + tile.outputs * columns * size


def best(
    kernel: str,
    candidates: Sequence[Tile],
    target: Target,
    kind: str,
    packed: Packed,
    m: int,
    size: int,
) -> tuple[Tile, int]:
    """The tile and the number of shares of the columns for m rows of x.

    `kind` says which products are used, `size` is the bytes of one element of x.
    """
    bits, n, k = packed.bits, packed.n, packed.k
    if (override := OVERRIDES.get((kernel, target.name, m, n, k))) is not None:
        return override
    fitted = [fit(tile, packed.group_lines, target) for tile in candidates]
    largest = _LARGEST.get(target.name, _USUAL)[packed.scaled]
    legal = [
        tile
        for tile in fitted
        if shared(tile, bits, size) <= target.shared and tile.rows * tile.outputs <= largest
    ]
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
        apart = 0.0 if shares == 1 else 2e-6 + shares * m * n * 8 / target.bandwidth
        return math.ceil(waves) * one + apart

    def splits(tile: Tile) -> tuple[int, ...]:
        chunks = packed.groups * math.ceil(packed.group_lines / tile.lines)
        return tuple(s for s in (1, 2, 4, 8, 16) if s == 1 or s * 2 <= chunks)

    choices = [(tile, s) for tile in legal for s in splits(tile)]
    return min(choices, key=lambda choice: seconds(*choice))
