"""COMQ: coordinate descent over codes and scales, from nearest rounding.

"COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization" (2024): each code in turn
goes to the nearest point of what the others leave for it, each scale to its least squares; only
products with `X^T X` and rounding. Checked: no step raises the output error, and the end is a
minimum in every entry. The paper orders the columns of each row by `|x_i| |w_i|`; here they go in
memory order, so that all rows share the products, and a sweep visits a group's scale before its
codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight
from qpass.rounding.columns import round_columns
from qpass.rounding.descent import descend
from qpass.rounding.hessian import Curvature


@final
@dataclass(frozen=True, slots=True)
class Comq(Rounding):
    name: str = "comq"
    needs: frozenset[Statistic] = frozenset({Statistic.HESSIAN, Statistic.HELD_HESSIAN})
    sweeps: int = 4

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        cost = Curvature.of(stats, weight_nk.shape[1])
        return round_columns(
            weight_nk,
            spec,
            cost.weights_k,
            lambda sheet: descend(sheet, cost.h_kk, sheet.rounded(), self.sweeps),
        )


ROUNDINGS.add(Comq())
