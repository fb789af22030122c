"""Weights for inputs that quantization before the product has changed.

The product should give what the float model's gives on `x_float`, but sees `x`. The weight of least
squares for that is `W C H^-1` with `C = sum x_float x^T` and `H = sum x x^T`; shrunk as H is, it is
`W + W (C - H) H^-1`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.rounding.base import Statistic, Stats
from qpass.rounding.hessian import Curvature, factored, second_moments, square


def excess(cost: Curvature, stats: Stats) -> Tensor:
    """`C - H` `[k, k]` in the units of `cost`, shrunk as it is."""
    k = len(cost.h_kk)
    hessian_kk = second_moments(stats, Statistic.HESSIAN, k)
    return (square(stats, Statistic.CROSS, k) - hessian_kk) * ((1 - cost.shrinkage) / cost.unit)


def corrected(weight_nk: Tensor, cost: Curvature, stats: Stats) -> Tensor:
    """The weight `[n, k]`, float64, that is best for the inputs that the product sees."""
    wide_nk = weight_nk.detach().double()
    factor = factored(cost.h_kk)
    # (C - H) (U D U^T)^-1, from the right
    change_kk = torch.linalg.solve_triangular(
        factor.upper_kk.T, excess(cost, stats), upper=False, left=False, unitriangular=True
    )
    change_kk = torch.linalg.solve_triangular(
        factor.upper_kk, change_kk / factor.pivots_k, upper=True, left=False, unitriangular=True
    )
    return wide_nk + wide_nk @ change_kk
