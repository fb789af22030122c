"""GPFQ: each column follows the path of the float model's outputs as closely as it can.

"Post-training Quantization for Neural Networks with Provable Guarantees" (2022): with the float
inputs X and the inputs Y that the quantized model has, code t is the nearest point to
`<Y_t, u + w_t X_t> / |Y_t|^2`, where u is the output error of the codes before it. Written with the
sums `X^T Y` and `Y^T Y`, no output is ever formed. It looks back only: no later column is expected
to make up for an error, which is why feedback by a factor of the Hessian does better on correlated
inputs. Checked: the codes equal those of the paper's recursion on the samples themselves. The
shrinkage of the Hessian applies to both sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight
from qpass.rounding.columns import Columns, round_columns
from qpass.rounding.feedback import feed_back
from qpass.rounding.hessian import Curvature, Factor
from qpass.rounding.shift import excess


@final
@dataclass(frozen=True, slots=True)
class Gpfq(Rounding):
    name: str = "gpfq"
    needs: frozenset[Statistic] = frozenset(
        {Statistic.HESSIAN, Statistic.HELD_HESSIAN, Statistic.CROSS}
    )
    shrinkage: float | None = None

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        k = weight_nk.shape[1]
        cost = Curvature.of(stats, k, self.shrinkage)
        back = Factor((cost.h_kk / cost.weights_k).triu(), cost.weights_k)
        shift_kk = (excess(cost, stats) / cost.weights_k).triu().float()

        def solve(sheet: Columns) -> Tensor:
            shift_kn = torch.mm(shift_kk.t(), sheet.want_kn)
            return feed_back(sheet, back, range(k), fit=False, shift_kn=shift_kn)

        return round_columns(weight_nk, spec, cost.weights_k, solve)


ROUNDINGS.add(Gpfq())
