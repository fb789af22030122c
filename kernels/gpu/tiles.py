"""Which tile of a matrix product a program computes, chosen from what a call costs on a target.

The candidates are few; a rough model of time ranks them, unless a table of measured ones names one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from qpass._kernels.gpu.packed import Packed
from qpass.runtime.target import Target
from qpass.runtime.tuned import bucket


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of x by outputs by lines of weights, and how Triton runs it.

    `spread`: x is put in the order of the weights' words first, which costs a pass over x and
    saves many small loads; `sort`: it is put in that order in registers. `pace` is the part of the
    peak that a large product reached on an H200. `shares`: as many programs share the columns.
    """

    rows: int
    outputs: int
    lines: int
    warps: int
    stages: int
    spread: bool
    pace: float = dataclasses.field(default=0.3, compare=False)
    sort: bool = False
    shares: int = 1


# the largest tile whose sums stay in registers beside all else, and the largest where the sums of a
# group are held beside the total
_LARGEST = {
    "sm_90": (128 * 256, 128 * 128),
    "sm_100": (128 * 128, 128 * 128),
    "sm_120": (128 * 128, 64 * 64),
}
_USUAL = (128 * 128, 64 * 128)
# the same for each warp, where a warp multiplies by itself
_WARP = (2048, 1024)
# several warps multiply together
TOGETHER = ("sm_90", "sm_100")
# seconds from asking memory for bytes to having them, under load
_LATENCY = 1.5e-6
# how much faster the cache that all share is
_CACHE = 6.0
# programs of one kernel that a multiprocessor holds at best
_RESIDENT = 8

# warps that keep a multiprocessor busy while others wait
_AWAKE = 8
# rows of the smallest tiles
FEWEST = 16
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


def _legal(tile: Tile, packed: Packed, size: int, target: Target) -> bool:
    sums = tile.rows * tile.outputs
    alone = target.backend == "cuda" and target.name not in TOGETHER
    return (
        shared(tile, packed.bits, size) <= target.shared
        and sums <= _LARGEST.get(target.name, _USUAL)[packed.scaled]
        and not (alone and sums > tile.warps * _WARP[packed.scaled])
    )


def shared(tile: Tile, bits: int, size: int) -> int:
    """About how many bytes of shared memory a tile takes, when an element of x takes `size`."""
    columns = tile.lines * 32 // bits
    step = tile.outputs * tile.lines * 4 + tile.rows * columns * size
    return tile.stages * step + tile.outputs * columns * size


def legal(candidates: Sequence[Tile], target: Target, packed: Packed, size: int) -> Sequence[Tile]:
    """The candidates, as they fit, with all shares; `size` is the bytes of one element of x."""
    fitted = [fit(tile, packed.group_lines, target) for tile in candidates]
    found: list[Tile] = []
    for tile in fitted:
        if _legal(tile, packed, size, target):
            chunks = packed.groups * math.ceil(packed.group_lines / tile.lines)
            shares = [s for s in (1, 2, 4, 8, 16) if s == 1 or s * 2 <= chunks]
            found += [dataclasses.replace(tile, shares=s) for s in shares]
    return found


def best(
    candidates: Sequence[Tile],
    target: Target,
    kind: str,
    packed: Packed,
    m: int,
    size: int,
) -> Tile:
    """The tile for m rows of x; `kind` says which products are used."""
    bits, n, k = packed.bits, packed.n, packed.k
    rate = target.peak.get(kind, target.peak["fp32"]) / target.multiprocessors
    bandwidth = target.bandwidth / target.multiprocessors
    once = n * k * bits / 8 + m * k * size

    def seconds(tile: Tile) -> float:
        shares = tile.shares
        programs = math.ceil(m / tile.rows) * math.ceil(n / tile.outputs) * shares
        width = k / shares
        each = programs / target.multiprocessors
        # weights on their way must cover the latency of memory
        asked = min(each, _RESIDENT) * (tile.stages - 1) * tile.outputs * tile.lines * 4
        part = min(1.0, asked / (bandwidth * _LATENCY))
        read = target.multiprocessors * (tile.outputs * width * bits / 8 + tile.rows * width * size)
        memory = max(once / part, each * read / _CACHE) / target.bandwidth
        done = 2 * tile.rows * tile.outputs * width
        # few programs do not wait for each other's turn, but too few warps wait for memory
        turns = math.ceil(each) if each > _RESIDENT / 2 else max(1.0, each)
        awake = min(1.0, each * tile.warps / _AWAKE) ** 0.5
        work = max(memory, turns * done / (tile.pace * rate * awake))
        passes = tile.spread * (1e-6 + 2 * m * k * size / target.bandwidth)
        apart = 0.0 if shares == 1 else 2.5e-6 + shares * m * n * 8 / target.bandwidth
        return work + passes + apart

    # most of a tile with many more rows than x has would be nothing
    few = [tile for tile in candidates if tile.rows <= max(FEWEST, bucket(m))]
    return min(legal(few or candidates, target, packed, size), key=seconds)
