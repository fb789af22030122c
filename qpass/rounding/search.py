"""Which scale and offset give a block the least squared error once they are stored.

Trying ends that clip, then alternating between codes and the least-squares scale for them. Every
trial is rounded to its stored precision before it is judged, and the plain scale (no clipping) is
the first trial, so the result is never worse than it.

Shapes: b blocks, l entries of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rounding.grid import Grid, Scales, columns, nearest_codes, squared_error

COARSE_TRIALS = 8
WIDER_TRIALS = 4
FINE_MOVES = (1 / 4, 1 / 10)
REFITS = 3
# an end that gives up more than this keeps too little of the block
WIDEST_CLIP = 0.9


def least_error(values_bl: Tensor, grid: Grid) -> Scales:
    """The best scales found for blocks whose values are finite and of moderate magnitude."""
    best = _symmetric(values_bl, grid) if grid.symmetric else _asymmetric(values_bl, grid)
    for _ in range(REFITS):
        best.offer(_refit(values_bl, grid, best.scales))
    return best.scales


@final
@dataclass(slots=True, eq=False)
class _Best:
    """The best scales of each block so far."""

    values_bl: Tensor
    grid: Grid
    scales: Scales
    error_b: Tensor

    @staticmethod
    def start(values_bl: Tensor, grid: Grid, first: Scales) -> _Best:
        return _Best(values_bl, grid, first, squared_error(values_bl, grid, first))

    def offer(self, trial: Scales) -> None:
        """Keep `trial` for the blocks where it is better."""
        error_b = squared_error(self.values_bl, self.grid, trial)
        better_b = error_b < self.error_b
        self.scales = self.scales.where(better_b, trial)
        self.error_b = torch.where(better_b, error_b, self.error_b)


def _reach(length: int, levels: float) -> float:
    """The largest part of a block's range worth clipping.

    Clipping a part `c` of the range R off one entry costs `(c R)^2`; it can gain at most the
    rounding error without it, about `length * (R / levels)^2 / 12`. Of an uneven format, the
    widest gap counts.
    """
    return min(WIDEST_CLIP, math.sqrt(length / 12) / levels)


def _symmetric(values_bl: Tensor, grid: Grid) -> _Best:
    low_b, high_b = values_bl.amin(1), values_bl.amax(1)
    extreme_b = torch.where(-low_b > high_b, low_b, high_b)
    zero_b = torch.zeros_like(extreme_b)
    # the side with one more level may face either way
    tops = [extreme_b.abs() / grid.high]
    if -grid.low > grid.high and grid.scales.signed:
        tops.append(extreme_b / grid.low)
    best = _Best.start(values_bl, grid, Scales(grid.stored(tops[0]), zero_b))
    reach = _reach(values_bl.shape[1], grid.high / grid.points.gap)
    keeps = [1 - reach * trial / COARSE_TRIALS for trial in range(COARSE_TRIALS + 1)]
    if not grid.even:
        # the last gap of an uneven format is wide: the second largest point may serve the extreme
        room = grid.high / grid.points.magnitudes[1] - 1
        keeps += [1 + room * trial / WIDER_TRIALS for trial in range(1, WIDER_TRIALS + 1)]
    if grid.scales.one_factor:
        # far apart: the nearest may clip more than is worth it
        best.offer(Scales(grid.scales.stored_above(tops[0]), zero_b))
    for keep in keeps:
        for top_b in tops:
            best.offer(Scales(grid.stored(keep * top_b), zero_b))
    for move in FINE_MOVES:
        around_b = best.scales.scale_b
        for factor in (1 - reach * move, 1 + reach * move):
            best.offer(Scales(grid.stored(factor * around_b), zero_b))
    return best


def _asymmetric(values_bl: Tensor, grid: Grid) -> _Best:
    low_b, high_b = values_bl.amin(1), values_bl.amax(1)
    range_b = high_b - low_b
    best = _Best.start(values_bl, grid, _between(low_b, high_b, grid))
    # where an offset is much larger than the scale, rounding it up would cut the low end off
    offset_b = grid.stored_below(low_b)
    best.offer(_between(offset_b, high_b, grid))
    reach = _reach(values_bl.shape[1], grid.high - grid.low) / 2
    for trial in range(1, COARSE_TRIALS + 1):
        cut_b = range_b * (reach * trial / COARSE_TRIALS)
        best.offer(_between(low_b + cut_b, high_b - cut_b, grid))
    for move in FINE_MOVES:
        step_b = range_b * (reach * move)
        for low_move, high_move in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            bottom_b = best.scales.offset_b + best.scales.scale_b * grid.low
            top_b = best.scales.offset_b + best.scales.scale_b * grid.high
            best.offer(_between(bottom_b + low_move * step_b, top_b + high_move * step_b, grid))
    return best


def _between(bottom_b: Tensor, top_b: Tensor, grid: Grid) -> Scales:
    """The grid whose lowest level is `bottom` and whose highest is `top`."""
    scale_b = grid.stored((top_b - bottom_b) / (grid.high - grid.low))
    return Scales(scale_b, grid.stored(bottom_b - scale_b * grid.low))


def _refit(values_bl: Tensor, grid: Grid, scales: Scales) -> Scales:
    """The least-squares scale and offset for the codes that `scales` give."""
    q_b, qq_b, u_b, qu_b = (torch.zeros_like(scales.scale_b) for _ in range(4))
    for part_bl in columns(values_bl):
        codes_bl = nearest_codes(part_bl, grid, scales)
        # sums relative to the present offset keep their digits when it is large
        rest_bl = part_bl - scales.offset_b.unsqueeze(1)
        q_b += codes_bl.sum(1)
        qq_b += codes_bl.square().sum(1)
        u_b += rest_bl.sum(1)
        qu_b += (codes_bl * rest_bl).sum(1)
    offset_b = scales.offset_b
    if not grid.symmetric:
        length = values_bl.shape[1]
        slope_b = _ratio(qu_b - q_b * u_b / length, qq_b - q_b.square() / length, scales.scale_b)
        offset_b = grid.stored(scales.offset_b + (u_b - slope_b * q_b) / length)
        qu_b = qu_b + (scales.offset_b - offset_b) * q_b
    return Scales(grid.stored(_ratio(qu_b, qq_b, scales.scale_b)), offset_b)


def _ratio(over_b: Tensor, under_b: Tensor, otherwise_b: Tensor) -> Tensor:
    safe_b = torch.where(under_b > 0, under_b, 1.0)
    return torch.where(under_b > 0, over_b / safe_b, otherwise_b)
