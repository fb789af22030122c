"""YAQA: errors are weighed on both sides, by the inputs and by what the model makes of the outputs.

"Model-Preserving Adaptive Rounding" (2025): with H of the inputs and G of the gradients at the
outputs, a change D of the weight costs about `tr(D H D^T G)` in the model's own loss. With factors
of both, `G = V B V^T` and `H = U A U^T`, entry (i, j) of `V^T D U` contains only earlier rows and
columns, so feedback goes along both. Rows are rounded `joint` at a time: within such a block there
is feedback along columns only. Scales are found as GPTQ finds them, for what the feedback has made
of a group. Checked: with one row at a time, the codes equal those of the paper's two-sided formula;
with G an identity they are those of GPTQ. Gradients are few: G is shrunk more than H.
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
from qpass.rounding.gptq import Order, column_order
from qpass.rounding.hessian import Curvature, factored, second_moments, shrunk
from qpass.rounding.ldlq import blocked


@final
@dataclass(frozen=True, slots=True)
class Yaqa(Rounding):
    name: str = "yaqa"
    needs: frozenset[Statistic] = frozenset(
        {Statistic.HESSIAN, Statistic.HELD_HESSIAN, Statistic.OUTPUT_HESSIAN}
    )
    joint: int = 32
    output_shrinkage: float = 0.1
    order: Order = "diagonal"

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        n, k = weight_nk.shape
        cost = Curvature.of(stats, k)
        g_nn = shrunk(second_moments(stats, Statistic.OUTPUT_HESSIAN, n), self.output_shrinkage)
        columns = column_order(cost.weights_k, self.order, spec)
        along_k = cost.factor(columns)
        order: list[int] = columns.tolist()

        def solve(sheet: Columns) -> Tensor:
            along_n = blocked(factored(g_nn[sheet.rows, sheet.rows]), self.joint)
            upper_nn = along_n.upper_kk.float()
            points_kn = torch.empty_like(sheet.want_kn)
            # losses in the weight's own units: rows may have been scaled apart
            lost_kn = torch.zeros_like(sheet.want_kn)
            for start in range(0, len(upper_nn), self.joint):
                rows = slice(start, min(start + self.joint, len(upper_nn)))
                part = sheet.some(rows)
                want_kn = part.want_kn
                passed_kn = lost_kn[:, :start] @ upper_nn[:start, rows]
                part.want_kn = want_kn + passed_kn / part.factor_n
                points_kn[:, rows] = feed_back(part, along_k, order, fit=not sheet.shared)
                lost_kn[:, rows] = (want_kn - points_kn[:, rows]) * part.factor_n
            return points_kn

        return round_columns(weight_nk, spec, cost.weights_k, solve)


ROUNDINGS.add(Yaqa())
