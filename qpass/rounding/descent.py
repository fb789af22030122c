"""Coordinate descent on the output error: every code, and every scale, given all others.

The cost of a row's change `d` is `d H d`. As a function of one entry it is a parabola, whose best
point is the nearest to its vertex; as a function of a group's scale too, with its codes held. No
step raises the cost. The idea is that of "COMQ: A Backpropagation-Free Algorithm for Post-Training
Quantization" (2024), from any start and with any points.

Shapes: k columns, n rows, l columns of a group, t columns of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.rounding.columns import Columns
from qpass.rounding.feedback import TILE
from qpass.rounding.grid import Scales, nearest_codes
from qpass.rounding.hessian import product


def descend(
    sheet: Columns, h_kk: Tensor, points_kn: Tensor, sweeps: int, *, refit: bool = True
) -> Tensor:
    """The points after some sweeps over all columns; the scales of `sheet` change with `refit`."""
    if sweeps == 0 or points_kn.numel() == 0:
        return points_kn
    h_kk = h_kk.float()
    points_kn = points_kn.clone()
    lost_kn = sheet.want_kn - points_kn
    for _ in range(sweeps):
        before_kn = points_kn.clone()
        for group in range(sheet.groups):
            columns = slice(group * sheet.length, (group + 1) * sheet.length)
            if refit:
                _refit(sheet, group, columns, h_kk, points_kn, lost_kn)
            for start in range(columns.start, columns.stop, TILE):
                tile = slice(start, min(start + TILE, columns.stop))
                _sweep(sheet, tile, h_kk, points_kn, lost_kn)
        if torch.equal(points_kn, before_kn):
            break
    return points_kn


def _sweep(sheet: Columns, tile: slice, h_kk: Tensor, points_kn: Tensor, lost_kn: Tensor) -> None:
    pull_tn = product(h_kk[tile], lost_kn)
    h_tt = h_kk[tile, tile]
    for at, column in enumerate(range(tile.start, tile.stop)):
        aim_n = torch.add(points_kn[column], pull_tn[at], alpha=1 / float(h_tt[at, at]))
        nearest_n = sheet.nearest(column, aim_n)
        gain_n = points_kn[column] - nearest_n
        points_kn[column] = nearest_n
        lost_kn[column] += gain_n
        pull_tn[at + 1 :].addr_(h_tt[at, at + 1 :], gain_n)


def _refit(
    sheet: Columns,
    group: int,
    columns: slice,
    h_kk: Tensor,
    points_kn: Tensor,
    lost_kn: Tensor,
) -> None:
    """Move a group's scale, and its offset if it has one, to the least squares for its codes."""
    grid, old = sheet.grid, sheet.scales(group)
    codes_ln = nearest_codes(points_kn[columns].t(), grid, old).t()
    pull_ln = product(h_kk[columns], lost_kn)
    bent_ln = product(h_kk[columns, columns], codes_ln)
    pull_n, bend_n = (codes_ln * pull_ln).sum(0), (codes_ln * bent_ln).sum(0)
    if sheet.shared:
        pull_n, bend_n = (t.sum(0, keepdim=True).expand_as(t) for t in (pull_n, bend_n))
    if grid.symmetric:
        scale_n = grid.stored(old.scale_b + _ratio(pull_n, bend_n))
        offset_n = old.offset_b
        step_n = scale_n - old.scale_b
        gain_n = step_n * (2 * pull_n - step_n * bend_n)
    else:
        cross_n, lift_n, flat = bent_ln.sum(0), pull_ln.sum(0), h_kk[columns, columns].sum()
        flat_n = flat.expand_as(cross_n)
        if sheet.shared:
            cross_n, lift_n, flat_n = (
                t.sum(0, keepdim=True).expand_as(t) for t in (cross_n, lift_n, flat_n)
            )
        slope_n = _ratio(pull_n - cross_n * lift_n / flat_n, bend_n - cross_n.square() / flat_n)
        offset_n = grid.stored(old.offset_b + (lift_n - slope_n * cross_n) / flat_n)
        shift_n = offset_n - old.offset_b
        scale_n = grid.stored(old.scale_b + _ratio(pull_n - shift_n * cross_n, bend_n))
        step_n = scale_n - old.scale_b
        gain_n = (
            step_n * (2 * pull_n - step_n * bend_n)
            + shift_n * (2 * lift_n - shift_n * flat_n)
            - 2 * step_n * shift_n * cross_n
        )
    better_n = (gain_n > 0) & (scale_n * old.scale_b > 0)
    new = old.where(better_n, Scales(scale_n, offset_n))
    sheet.put(group, new)
    moved_ln = codes_ln * new.scale_b + (0 if grid.symmetric else new.offset_b)
    points_kn[columns] = torch.where(better_n, moved_ln, points_kn[columns])
    lost_kn[columns] = sheet.want_kn[columns] - points_kn[columns]


def _ratio(over_n: Tensor, under_n: Tensor) -> Tensor:
    return torch.where(under_n > 0, over_n / torch.where(under_n > 0, under_n, 1.0), 0.0)
