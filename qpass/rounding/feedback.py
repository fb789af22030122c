"""Rounding column after column, each making up for what the earlier ones lost.

With `H = U D U^T` (`hessian.Factor`) the cost of a change `d` of a row is `sum_i D_i (d U)_i^2`,
and the entry i of `d U` contains only columns up to i: given the earlier ones, rounding
`w_i + sum_{j<i} d_j U_ji` to its nearest point is the best that column i can do. It costs
`D_i e_i^2` with e the distance to that point.

Shapes: k columns, n rows, l columns of a group, t columns of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.rounding.columns import Columns
from qpass.rounding.hessian import Factor, product, solve_unit
from qpass.rounding.weighted import fit_weighted

# columns whose losses are passed on one by one; to all later ones they go together
TILE = 128


def feed_back(
    sheet: Columns,
    factor: Factor,
    order: Sequence[int],
    *,
    fit: bool,
    shift_kn: Tensor | None = None,
) -> Tensor:
    """The points `[k, n]` chosen in `order`, which is also that of `factor`.

    With `fit`, the scales of a group are found when its first column is reached, for the weight
    that the losses so far have made of it. A `shift` is added to what columns aim at.
    """
    upper_kk = factor.upper_kk.float()
    pivots_k = factor.pivots_k.float()
    places = torch.tensor(order, dtype=torch.int64, device=upper_kk.device)
    want_kn = sheet.want_kn[places]
    lost_kn = torch.zeros_like(want_kn)
    fitted: set[int] = set()
    for start in range(0, len(order), TILE):
        end = min(start + TILE, len(order))
        aim_tn = want_kn[start:end] + product(upper_kk[:start, start:end].t(), lost_kn[:start])
        if shift_kn is not None:
            aim_tn += shift_kn[places[start:end]]
        for at in range(start, end):
            group = order[at] // sheet.length
            if fit and group not in fitted:
                fitted.add(group)
                mine = (places // sheet.length == group).nonzero().squeeze(1)
                aim_ln = want_kn[mine] + product(_made_up(upper_kk, at, mine).t(), lost_kn[:at])
                scales = fit_weighted(aim_ln.t(), pivots_k[mine].unsqueeze(0), sheet.grid)
                # quiet columns may aim further than the scale format reaches
                held_n = scales.scale_b.isfinite() & scales.offset_b.isfinite()
                sheet.put(group, sheet.scales(group).where(held_n, scales))
            aim_n = aim_tn[at - start]
            lost_kn[at] = want_kn[at] - sheet.nearest(order[at], aim_n)
            aim_tn[at - start + 1 :].addr_(upper_kk[at, at + 1 : end], lost_kn[at])
    points_kn = torch.empty_like(want_kn)
    points_kn[places] = want_kn - lost_kn
    return points_kn


def _made_up(upper_kk: Tensor, at: int, mine_l: Tensor) -> Tensor:
    """`[at, l]`: how the best weight of some columns changes with the losses of the first `at`.

    When all columns from `at` on may still change, their best weights are `-d U V^-1` away, with
    the losses `d`, U the rows of the factor before `at` and V those after.
    """
    last = int(mine_l[-1]) + 1
    picked = torch.zeros(last - at, len(mine_l), dtype=upper_kk.dtype, device=upper_kk.device)
    picked[mine_l - at, torch.arange(len(mine_l), device=upper_kk.device)] = 1
    return product(upper_kk[:at, at:last], solve_unit(upper_kk[at:last, at:last], picked))
