"""Scales that weigh every column by how much its inputs matter; codes of the nearest points.

The error of a block counts `sum_i h_i (w_i - point_i)^2` with h the diagonal of the Hessian. As in
"NeUQI: Near-Optimal Uniform Quantization Parameter Initialization" (2025), asymmetric grids have a
free offset, and scale and offset are searched together under that weighted error. That paper finds
the best offset of each trial scale exactly, by its break-points; here a line of trial scales times
a few places of the range is refined by weighted least squares and small moves, which also serves
uneven points and coarse scale formats. Checked: never worse than the scales of nearest rounding
under the same weights, and against a dense search of scale and offset on small blocks.

Shapes: b blocks, l entries of a block, n rows, k columns, g groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight
from qpass.rounding.grid import Grid, Scales, columns, nearest_codes, nearest_points
from qpass.rounding.hessian import Curvature
from qpass.rounding.nearest import fit_scales
from qpass.rounding.rows import CHUNK, Result, row_chunks, scaled_blocks

REFITS = 3
# an outlier that hardly matters may be clipped further than any other pays for
WIDE_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
COARSE_TRIALS = 8
WIDER_TRIALS = 4
# where a shorter range may lie within the block's own
PLACES = (0.5, 0.0, 1.0)
FINE_MOVES = (1 / 16, 1 / 40)


@final
@dataclass(frozen=True, slots=True)
class Weighted(Rounding):
    name: str = "weighted"
    needs: frozenset[Statistic] = frozenset({Statistic.HESSIAN, Statistic.HELD_HESSIAN})

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        grid = Grid.of(spec)
        weights_k = Curvature.of(stats, weight_nk.shape[1], 1.0).weights_k.float()
        result = Result.empty(weight_nk, spec)
        for rows, part in row_chunks(weight_nk, spec):
            values_bl, factors = scaled_blocks(part, spec, grid)
            scales = fit_weighted(values_bl, block_weights(weights_k, values_bl), grid)
            result.put(rows, nearest_codes(values_bl, grid, scales), scales, factors)
        return result.finish()


def block_weights(weights_k: Tensor, values_bl: Tensor) -> Tensor:
    """`[b, l]`: the weight of each entry of the blocks of rows, which come one after the other."""
    b, l = values_bl.shape  # noqa: E741
    rows = b * l // len(weights_k)
    if rows * len(weights_k) == l:
        return weights_k.repeat(rows).unsqueeze(0)
    return weights_k.view(1, -1, l).expand(rows, -1, -1).reshape(b, l)


def fit_weighted(values_bl: Tensor, weights_bl: Tensor, grid: Grid) -> Scales:
    """The scales of least weighted error that were found; `weights` may be `[1, l]`.

    Never worse than those of nearest rounding, which are kept where they lose nothing.
    """
    step = max(1, CHUNK // max(1, values_bl.shape[1]))
    if len(values_bl) <= step:
        return _fit(values_bl, weights_bl, grid)
    parts = []
    for at in range(0, len(values_bl), step):
        weights = weights_bl if len(weights_bl) == 1 else weights_bl[at : at + step]
        parts.append(_fit(values_bl[at : at + step], weights, grid))
    return Scales(
        torch.cat([part.scale_b for part in parts]), torch.cat([part.offset_b for part in parts])
    )


def _fit(values_bl: Tensor, weights_bl: Tensor, grid: Grid) -> Scales:
    values_bl = values_bl.t().contiguous().t() if len(values_bl) > values_bl.shape[1] else values_bl
    best = _Best.start(values_bl, weights_bl, grid, fit_scales(values_bl, grid))
    for trial in _symmetric(best) if grid.symmetric else _asymmetric(best):
        best.offer(trial)
    for _ in range(REFITS):
        best.offer(_refit(best))
    for move in FINE_MOVES:
        for trial in _around(best, move):
            best.offer(trial)
        best.offer(_refit(best))
    return best.scales


@final
@dataclass(slots=True, eq=False)
class _Best:
    """The best scales of each block so far."""

    values_bl: Tensor
    weights_bl: Tensor
    grid: Grid
    scales: Scales
    error_b: Tensor

    @staticmethod
    def start(values_bl: Tensor, weights_bl: Tensor, grid: Grid, first: Scales) -> _Best:
        best = _Best(values_bl, weights_bl, grid, first, torch.empty(0))
        best.error_b = best.error(first)
        return best

    def error(self, scales: Scales) -> Tensor:
        """The weighted squared error of each block, `[b]`."""
        total_b = torch.zeros_like(scales.scale_b)
        for part_bl, weights_bl in self.parts():
            lost_bl = nearest_points(part_bl, self.grid, scales).sub_(part_bl).square_()
            total_b += lost_bl.mul_(weights_bl).sum(1)
        return total_b

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Values and weights in parts of a fixed length."""
        return zip(columns(self.values_bl), columns(self.weights_bl), strict=True)

    def offer(self, trial: tuple[Tensor, Tensor]) -> None:
        """Keep a scale and an offset, before they are stored, for the blocks where they fit."""
        scale_b, offset_b = self.grid.stored(trial[0]), trial[1]
        if not self.grid.symmetric:
            offset_b = self.grid.stored(offset_b)
        scales = Scales(scale_b, offset_b)
        error_b = self.error(scales)
        # a scale format without a sign cannot hold every trial
        better_b = (error_b < self.error_b) & (scale_b * trial[0] > 0)
        self.scales = self.scales.where(better_b, scales)
        self.error_b = torch.where(better_b, error_b, self.error_b)


def _keeps(length: int, levels: float) -> list[float]:
    """Which parts of a block's range to try as the range of the grid, all of it first.

    The plain reach is where clipping one entry costs what all others can gain.
    """
    reach = min(0.9, math.sqrt(length / 12) / levels)
    fine = [1 - reach * trial / COARSE_TRIALS for trial in range(COARSE_TRIALS + 1)]
    return fine + [keep for keep in WIDE_KEEPS if keep < fine[-1]]


def _symmetric(best: _Best) -> Iterator[tuple[Tensor, Tensor]]:
    grid = best.grid
    low_b, high_b = best.values_bl.amin(1), best.values_bl.amax(1)
    extreme_b = torch.where(-low_b > high_b, low_b, high_b)
    tops = [extreme_b.abs() / grid.high]
    if -grid.low > grid.high and grid.scales.signed:
        # the side with one more level may face either way
        tops.append(extreme_b / grid.low)
    keeps = _keeps(best.values_bl.shape[1], grid.high / grid.points.gap)
    if not grid.even:
        # the last gap of an uneven format is wide: the second largest point may serve the extreme
        room = grid.high / grid.points.magnitudes[1] - 1
        keeps += [1 + room * trial / WIDER_TRIALS for trial in range(1, WIDER_TRIALS + 1)]
    for keep in keeps:
        for top_b in tops:
            yield keep * top_b, torch.zeros_like(top_b)


def _asymmetric(best: _Best) -> Iterator[tuple[Tensor, Tensor]]:
    grid = best.grid
    low_b, high_b = best.values_bl.amin(1), best.values_bl.amax(1)
    range_b = high_b - low_b
    levels = grid.high - grid.low
    for keep in _keeps(best.values_bl.shape[1], levels):
        scale_b = keep * range_b / levels
        for place in PLACES if keep < 1 else PLACES[:1]:
            yield scale_b, low_b + place * (1 - keep) * range_b - scale_b * grid.low


def _around(best: _Best, move: float) -> Iterator[tuple[Tensor, Tensor]]:
    """A little longer or shorter, and for asymmetric grids, a little up or down."""
    grid = best.grid
    for sign in (1, -1):
        yield best.scales.scale_b * (1 + sign * move), best.scales.offset_b
    if grid.symmetric:
        return
    for sign in (1, -1):
        shift_b = sign * move * (grid.high - grid.low) / 2 * best.scales.scale_b
        yield best.scales.scale_b, best.scales.offset_b + shift_b
    for end in (grid.low, grid.high):
        for sign in (1, -1):
            change_b = sign * move * best.scales.scale_b
            yield best.scales.scale_b + change_b, best.scales.offset_b - change_b * end


def _refit(best: _Best) -> tuple[Tensor, Tensor]:
    """The weighted least-squares scale and offset for the codes of the best so far."""
    scales, grid = best.scales, best.grid
    q_b, qq_b, u_b, qu_b, h_b = (torch.zeros_like(scales.scale_b) for _ in range(5))
    for part_bl, weights_bl in best.parts():
        points_bl = nearest_codes(part_bl, grid, scales)
        # sums relative to the present offset keep their digits when it is large
        rest_bl = part_bl - scales.offset_b.unsqueeze(1)
        weighted_bl = points_bl * weights_bl
        q_b += weighted_bl.sum(1)
        qq_b += (weighted_bl * points_bl).sum(1)
        qu_b += (weighted_bl * rest_bl).sum(1)
        u_b += (rest_bl * weights_bl).sum(1)
        h_b += weights_bl.sum(1)
    if grid.symmetric:
        return _ratio(qu_b, qq_b, scales.scale_b), scales.offset_b
    h_b = h_b.clamp_min(torch.finfo(torch.float32).tiny)
    slope_b = _ratio(qu_b - q_b * u_b / h_b, qq_b - q_b.square() / h_b, scales.scale_b)
    offset_b = grid.stored(scales.offset_b + (u_b - slope_b * q_b) / h_b)
    # the offset is stored first: the scale makes up for what that moved
    moved_b = (scales.offset_b - offset_b) * q_b
    return _ratio(qu_b + moved_b, qq_b, scales.scale_b), offset_b


def _ratio(over_b: Tensor, under_b: Tensor, otherwise_b: Tensor) -> Tensor:
    safe_b = torch.where(under_b > 0, under_b, 1.0)
    return torch.where(under_b > 0, over_b / safe_b, otherwise_b)


ROUNDINGS.add(Weighted())
