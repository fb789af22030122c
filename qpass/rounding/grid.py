"""Which numbers a block can take: its scale and offset, as stored, and the codes between.

Shapes: b blocks, l entries of a block, n rows, k columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantSpec

# longer blocks are summed in parts: shorter than what torch spreads over threads, so that sums do
# not depend on how many there are
PART = 2**14


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """The integers `low` to `high`, and the precision that scales and offsets are stored in."""

    low: int
    high: int
    symmetric: bool
    dtype: torch.dtype

    @staticmethod
    def of(spec: QuantSpec) -> Grid:
        codes = spec.codes
        return Grid(int(codes.low), int(codes.high), spec.symmetric, spec.scale_dtype)

    def stored(self, x: Tensor) -> Tensor:
        """`x` rounded to what a scale or an offset can hold, in float32."""
        return x.to(self.dtype).float()

    def stored_below(self, x: Tensor) -> Tensor:
        """As `stored`, but rounded down."""
        near = self.stored(x)
        # 0.6 of the spacing: less would round back, more would skip a number
        lower = self.stored(near - 0.6 * torch.finfo(self.dtype).eps * near.abs())
        return torch.where(near > x, lower, near)


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
    """Float32 codes `[b, l]` of the nearest points; a block with scale 0 gets code 0."""
    safe_b = torch.where(scales.scale_b == 0, torch.inf, scales.scale_b)
    from_zero_bl = values_bl if grid.symmetric else values_bl - scales.offset_b.unsqueeze(1)
    return (from_zero_bl / safe_b.unsqueeze(1)).round_().clamp_(grid.low, grid.high)


def nearest_points(values_bl: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The numbers `[b, l]` that the nearest codes stand for, evaluated as they will be."""
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
