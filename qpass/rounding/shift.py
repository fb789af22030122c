"""Weights for inputs that quantization before the product has changed.

The product should give what the float model's gives on `x_float`, but sees `x`. The weight of least
squares for that is `W C H^-1` with `C = sum x_float x^T` and `H = sum x x^T`; shrunk as H is, it is
`W + W (C - H) H^-1`. From few samples that correction is mostly noise: as much of it is taken as
half of the samples ask for when it rests on the other half.
"""

from __future__ import annotations

from torch import Tensor

from qpass.rounding.base import Statistic, Stats
from qpass.rounding.hessian import (
    Curvature,
    Factor,
    factored,
    second_moments,
    shrunk,
    solve_unit,
    square,
)


def excess(cost: Curvature, stats: Stats) -> Tensor:
    """`C - H` `[k, k]` in the units of `cost`, shrunk as it is."""
    k = len(cost.h_kk)
    hessian_kk = second_moments(stats, Statistic.HESSIAN, k)
    return (square(stats, Statistic.CROSS, k) - hessian_kk) * ((1 - cost.shrinkage) / cost.unit)


def corrected(weight_nk: Tensor, cost: Curvature, stats: Stats) -> Tensor:
    """The weight `[n, k]`, float64, that is best for the inputs that the product sees."""
    wide_nk = weight_nk.detach().double()
    change_nk = _change(wide_nk, excess(cost, stats), factored(cost.h_kk))
    return wide_nk + amount(wide_nk, cost, stats) * change_nk


def amount(weight_nk: Tensor, cost: Curvature, stats: Stats) -> float:
    """How much of the correction pays on samples that it does not rest on, from 0 to 1.

    A part b of the change D costs `b^2 tr(D H D^T) - 2 b tr(W (C - H) D^T)` more than none.
    """
    k = len(cost.h_kk)
    if Statistic.HELD_CROSS not in stats or Statistic.HELD_HESSIAN not in stats:
        return 1.0
    h_kk = second_moments(stats, Statistic.HESSIAN, k)
    held_kk = second_moments(stats, Statistic.HELD_HESSIAN, k)
    held_excess_kk = square(stats, Statistic.HELD_CROSS, k) - held_kk
    rest_kk = h_kk - held_kk
    rest_excess_kk = square(stats, Statistic.CROSS, k) - h_kk - held_excess_kk
    halves = (rest_kk, rest_excess_kk), (held_kk, held_excess_kk)
    pull = bend = 0.0
    for (mine_kk, excess_kk), (other_kk, other_excess_kk) in (halves, halves[::-1]):
        unit = float(mine_kk.diagonal().mean()) if k else 0.0
        if not unit > 0:
            return 0.0
        factor = factored(shrunk(mine_kk, cost.shrinkage))
        change_nk = _change(weight_nk, excess_kk * ((1 - cost.shrinkage) / unit), factor)
        pull += float((weight_nk @ other_excess_kk * change_nk).sum())
        bend += float((change_nk @ other_kk * change_nk).sum())
    return min(1.0, max(0.0, pull / bend)) if bend > 0 else 0.0


def _change(weight_nk: Tensor, excess_kk: Tensor, factor: Factor) -> Tensor:
    """`W (C - H) H^-1`."""
    # H^-1 (C - H)^T, H = U D U^T
    change_kk = solve_unit(factor.upper_kk, excess_kk.t())
    change_kk = solve_unit(
        factor.upper_kk, change_kk / factor.pivots_k.unsqueeze(1), transposed=True
    )
    return weight_nk @ change_kk.t()
