"""GPTQ: columns are rounded one at a time, and the columns after them make up for their losses.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). The
paper updates the weights with rows of the Cholesky factor of the inverse Hessian; here the same
codes come from the factor of the Hessian itself ("The Geometry of LLM Quantization: GPTQ as
Babai's Nearest Plane Algorithm", 2025), which needs no inverse. Checked: the codes equal those of
the paper's algorithm, written as it is there, with and without act-order; lazy tiles change none.
Where the paper adds 1% of the mean diagonal, the off-diagonal part is shrunk by what held-out
samples ask for; columns without any input are rounded to nearest instead of being zeroed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight
from qpass.rounding.columns import Columns, round_columns
from qpass.rounding.descent import descend
from qpass.rounding.feedback import feed_back
from qpass.rounding.hessian import Curvature
from qpass.rounding.shift import corrected

Order = Literal["memory", "diagonal", "groups"]


@final
@dataclass(frozen=True, slots=True)
class Gptq(Rounding):
    """`order`: columns as they come, by descending diagonal (act-order), or the same by group.

    With `static` scales all groups' are found first; otherwise each when its first column is
    reached. `sweeps` of coordinate descent over codes and scales may follow. With CROSS among its
    `needs`, the weight is first corrected for inputs that differ from the float model's.
    """

    name: str = "gptq"
    needs: frozenset[Statistic] = frozenset({Statistic.HESSIAN, Statistic.HELD_HESSIAN})
    order: Order = "diagonal"
    static: bool = False
    sweeps: int = 0
    shrinkage: float | None = None

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        cost = Curvature.of(stats, weight_nk.shape[1], self.shrinkage)
        h_kk = cost.h_kk
        columns = column_order(cost.weights_k, self.order, spec)
        factor = cost.factor(columns)
        order: list[int] = columns.tolist()
        static = self.static or spec.block == "tensor"
        if Statistic.CROSS in self.needs:
            weight_nk = corrected(weight_nk, cost, stats)

        def solve(sheet: Columns) -> Tensor:
            points_kn = feed_back(sheet, factor, order, fit=not static)
            return descend(sheet, h_kk, points_kn, self.sweeps)

        return round_columns(weight_nk, spec, cost.weights_k, solve)


def column_order(diagonal_k: Tensor, order: Order, spec: QuantSpec) -> Tensor:
    """The columns in the order in which they are rounded; equals stay as they are."""
    k = len(diagonal_k)
    columns = torch.arange(k, device=diagonal_k.device)
    if order == "memory" or k == 0:
        return columns
    columns = diagonal_k.argsort(descending=True, stable=True)
    if order == "groups" and isinstance(spec.block, int):
        length = spec.block
        heaviest_g = diagonal_k.view(-1, length).amax(1)
        rank_g = heaviest_g.argsort(descending=True, stable=True).argsort()
        columns = columns[rank_g[columns // length].argsort(stable=True)]
    return columns


ROUNDINGS.add(Gptq())
ROUNDINGS.add(Gptq("gptq-descent", sweeps=3))
COMPARED = Gptq().needs | {Statistic.CROSS, Statistic.HELD_CROSS}
ROUNDINGS.add(Gptq("gptq-cross", COMPARED, sweeps=3))
