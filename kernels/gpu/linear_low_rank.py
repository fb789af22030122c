"""`linear.real` and `linear.codes` with a branch of low rank, by the kernels for many rows.

They add the branch to the sums in their registers; these here are the same kernels, asked for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import qpass._kernels.gpu.linear_codes_matrix
import qpass._kernels.gpu.linear_real_matrix  # noqa: F401 what is looked up below
from qpass._kernels.gpu.low_rank import refuse_branch
from qpass._kernels.gpu.weights import rows_of
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target

RANK = 32
# for each of these numbers of rows, the first build of the plain kernel is one with a branch too
ROWS = (16, 4096)


def with_branch(plain: Kernel) -> Kernel:
    """The kernel that serves the operator of a plain one with a branch."""

    def accepts(call: Call) -> str | None:
        # the branch comes last: a weight that does not fit is what it is said to be
        return plain.accepts(call) or refuse_branch(call, call.values[0])

    def cost(call: Call) -> Cost:
        x, low, up = call.values[0], call["low"], call["up"]
        without = plain.cost(call)
        moved = low.numel() * low.element_size() + up.numel() * up.element_size()
        added = 2.0 * rows_of(x) * up.numel()
        return Cost(without.nbytes + moved, without.operations + added, without.kind)

    def builds(target: Target) -> Sequence[Build] | str:
        found = plain.builds(target)
        if isinstance(found, str):
            return found
        firsts = (next((b for b in found if f" m {m}" in b.label), None) for m in ROWS)
        return [_build(build) for build in firsts if build is not None]

    return Kernel(
        name=f"{plain.name}_low_rank",
        operator=f"{plain.operator}_low_rank",
        accepts=accepts,
        launch=plain.launch,
        cost=cost,
        builds=builds,
    )


def _build(plain: Build) -> Build:
    """The build with a branch, in the type of the result."""
    kind = plain.signature["out"]
    constants = {k: v for k, v in plain.constants.items() if k not in ("low", "up", "rank")}
    signature = {**plain.signature, "low": kind, "up": kind, "rank": "i32"}
    return dataclasses.replace(
        plain,
        label=f"{plain.label} rank {RANK}",
        signature=signature,
        constants=constants,
        divisible=plain.divisible | {"rank"},
    )


for name in ("linear_real_matrix", "linear_codes_matrix"):
    KERNELS.add(with_branch(KERNELS[name]))
