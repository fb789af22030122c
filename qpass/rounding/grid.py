"""Which numbers a block can take: its scale and offset, as stored, and the points between.

Everything here counts in points of the format. Those of integers are their codes; `Result` turns
the points of any format into codes.

Shapes: b blocks, l entries of a block, n rows, k columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import Format, Integers, QuantSpec, ScaleFormat

# longer blocks are summed in parts: shorter than what torch spreads over threads, so that sums do
# not depend on how many there are
PART = 2**14


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """The points of a format, and the numbers that scales and offsets can be.

    The points of asymmetric grids are integers.
    """

    points: Format
    scales: ScaleFormat
    symmetric: bool

    @staticmethod
    def of(spec: QuantSpec) -> Grid:
        return Grid(spec.codes, spec.scales, spec.symmetric)

    @property
    def low(self) -> float:
        """The smallest point."""
        return self.points.low

    @property
    def high(self) -> float:
        """The largest point."""
        return self.points.high

    @property
    def even(self) -> bool:
        """Whether neighbouring points are all as far apart: they are integers."""
        return isinstance(self.points, Integers)

    def stored(self, x: Tensor) -> Tensor:
        """`x` rounded to what a scale or an offset can hold, in float32."""
        return self.scales.stored(x)

    def stored_below(self, x: Tensor) -> Tensor:
        """As `stored`, but rounded down."""
        return self.scales.stored_below(x)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """One scale and one offset for each block, float32 `[b]` and already as stored."""

    scale_b: Tensor
    offset_b: Tensor

    def at(self, blocks_b: Tensor) -> Scales:
        """The scales of some blocks."""
        return Scales(self.scale_b[blocks_b], self.offset_b[blocks_b])

    def where(self, better_b: Tensor, other: Scales) -> Scales:
        """`other` where it is better, these elsewhere."""
        return Scales(
            torch.where(better_b, other.scale_b, self.scale_b),
            torch.where(better_b, other.offset_b, self.offset_b),
        )


def nearest_codes(values_bl: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The nearest points `[b, l]` of the format, unscaled; a block with scale 0 gets point 0."""
    safe_b = torch.where(scales.scale_b == 0, torch.inf, scales.scale_b)
    from_zero_bl = values_bl if grid.symmetric else values_bl - scales.offset_b.unsqueeze(1)
    return grid.points.round_(from_zero_bl / safe_b.unsqueeze(1))


def nearest_points(values_bl: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The numbers `[b, l]` that the nearest points stand for, evaluated as they will be."""
    points_bl = nearest_codes(values_bl, grid, scales).mul_(scales.scale_b.unsqueeze(1))
    return points_bl if grid.symmetric else points_bl.add_(scales.offset_b.unsqueeze(1))


def squared_error(values_bl: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The squared error of each block, `[b]`."""
    total_b = torch.zeros_like(scales.scale_b)
    for part_bl in columns(values_bl):
        total_b += nearest_points(part_bl, grid, scales).sub_(part_bl).square_().sum(1)
    return total_b


def columns(values_bl: Tensor) -> tuple[Tensor, ...]:
    """The blocks in parts of a fixed length."""
    return values_bl.split(PART, dim=1)
