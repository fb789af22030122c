"""LDLQ and BlockLDLQ: linear feedback by a factor of the Hessian, in memory order.

"QuIP: 2-Bit Quantization of Large Language Models With Guarantees" (2023) proves that feedback by
the LDL factor is the best linear one, and that it is GPTQ; "QuIP#: Even Better LLM Quantization
with Hadamard Incoherence and Lattice Codebooks" (2024) rounds `joint` columns at once, without
feedback among them, which is what formats of more than one dimension need. Checked: with one column
at a time the codes are those of GPTQ in memory order; the block factor gives the Hessian back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight
from qpass.rounding.columns import round_columns
from qpass.rounding.feedback import feed_back
from qpass.rounding.hessian import Curvature, Factor, factored, solve_unit


@final
@dataclass(frozen=True, slots=True)
class Ldlq(Rounding):
    name: str = "ldlq"
    needs: frozenset[Statistic] = frozenset({Statistic.HESSIAN, Statistic.HELD_HESSIAN})
    joint: int = 1

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        k = weight_nk.shape[1]
        cost = Curvature.of(stats, k)
        factor = blocked(factored(cost.h_kk), self.joint)
        return round_columns(
            weight_nk,
            spec,
            cost.weights_k,
            lambda sheet: feed_back(sheet, factor, range(k), fit=False),
        )


def blocked(factor: Factor, joint: int) -> Factor:
    """The factor with identities for its diagonal blocks of `joint` columns.

    `pivots` become the diagonal of what then stands in the middle: what the error of each column
    costs as long as the others of its block have none.
    """
    if joint == 1:
        return factor
    upper_kk, pivots_k = factor.upper_kk.clone(), factor.pivots_k.clone()
    for start in range(0, len(pivots_k), joint):
        block = slice(start, start + joint)
        corner = factor.upper_kk[block, block]
        above = factor.upper_kk[: start + joint, block]
        upper_kk[: start + joint, block] = solve_unit(corner, above.t(), transposed=True).t()
        pivots_k[block] = (corner.square() * factor.pivots_k[block]).sum(1)
    return Factor(upper_kk, pivots_k)


ROUNDINGS.add(Ldlq())
