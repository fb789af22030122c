"""Weights for inputs that quantization before the product has changed.

The product should give what the float model's gives on `x_float`, but sees `x`. The weight of least
squares for that is `W C H^-1` with `C = sum x_float x^T` and `H = sum x x^T`; shrunk as H is, it is
`W + W (C - H) H^-1`.
"""

from __future__ import annotations

from torch import Tensor

from qpass.rounding.base import Statistic, Stats
from qpass.rounding.hessian import Curvature, factored, second_moments, solve_unit, square


def excess(cost: Curvature, stats: Stats) -> Tensor:
    """`C - H` `[k, k]` in the units of `cost`, shrunk as it is."""
    k = len(cost.h_kk)
    hessian_kk = second_moments(stats, Statistic.HESSIAN, k)
    return (square(stats, Statistic.CROSS, k) - hessian_kk) * ((1 - cost.shrinkage) / cost.unit)


def corrected(weight_nk: Tensor, cost: Curvature, stats: Stats) -> Tensor:
    """The weight `[n, k]`, float64, that is best for the inputs that the product sees."""
    wide_nk = weight_nk.detach().double()
    factor = factored(cost.h_kk)
    # H^-1 (C - H)^T, H = U D U^T
    change_kk = solve_unit(factor.upper_kk, excess(cost, stats).t())
    change_kk = solve_unit(
        factor.upper_kk, change_kk / factor.pivots_k.unsqueeze(1), transposed=True
    )
    return wide_nk + wide_nk @ change_kk.t()
