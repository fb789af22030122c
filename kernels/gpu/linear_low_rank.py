"""`linear.real` and `linear.codes` with a branch of low rank, by the kernels for many rows.

They add the branch to the sums in their registers; these here are the same kernels, asked for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import qpass._kernels.gpu.linear_codes_matrix
import qpass._kernels.gpu.linear_real_matrix  # noqa: F401 what is looked up below
from qpass._kernels.gpu.low_rank import refuse_branch
from qpass._kernels.gpu.tiles import Tile
from qpass._kernels.gpu.weights import rows_of
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, launch

RANK = 32
# for each of these numbers of rows, the first build of the plain kernel is one with a branch too
ROWS = (16, 4096)
# more sums of a warp leave no registers for the branch
MOST_SUMS = 2048
# rows of the smallest product
LEAST = 16


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

    assert plain.tuning is not None
    usual: Tuning = plain.tuning
    name = f"{plain.name}_low_rank"
    tuning = dataclasses.replace(
        usual,
        # each once, in their order
        candidates=lambda call: [*dict.fromkeys(map(narrower, usual.candidates(call)))],
        choose=lambda call: narrower(usual.choose(call)),
    )
    return Kernel(
        name=name,
        operator=f"{plain.operator}_low_rank",
        accepts=accepts,
        launch=launch(name, tuning),
        cost=cost,
        builds=builds,
        tuning=tuning,
    )


def narrower(tile: Tile) -> Tile:
    """A tile of fewer rows, where sums fill the registers."""
    rows = _rows(tile.rows, tile.outputs, tile.warps)
    return dataclasses.replace(tile, rows=rows)


def _rows(rows: int, outputs: int, warps: int) -> int:
    """So many rows of a tile that its sums leave registers, and at least 16."""
    while rows > LEAST and rows * outputs > warps * MOST_SUMS:
        rows //= 2
    return rows


def _build(plain: Build) -> Build:
    """The build with a branch, in the type of the result."""
    kind = plain.signature["out"]
    constants = {k: v for k, v in plain.constants.items() if k not in ("low", "up", "rank")}
    signature = {**plain.signature, "low": kind, "up": kind, "rank": "i32"}
    rows, outputs, programs = constants["BM"], constants["BN"], plain.programs
    assert isinstance(rows, int)
    assert isinstance(outputs, int)
    assert programs is not None
    constants["BM"] = _rows(rows, outputs, plain.warps)
    programs *= rows // _rows(rows, outputs, plain.warps)
    return dataclasses.replace(
        plain,
        programs=programs,
        label=f"{plain.label} rank {RANK}",
        signature=signature,
        constants=constants,
        divisible=plain.divisible | {"rank"},
    )


for plain_name in ("linear_real_matrix", "linear_codes_matrix"):
    KERNELS.add(with_branch(KERNELS[plain_name]))
