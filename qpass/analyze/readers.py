"""Which weights are contracted with values, whatever the operator and the rank of the weight."""

from __future__ import annotations

from qpass.analyze.solution import collect
from qpass.ir import Program, read
from qpass.rotations import Group


def find_readers(program: Program) -> dict[str, tuple[int, ...]]:
    """The axes on which each use of a weight is summed over in a product, in graph order.

    Products of experts, convolutions and einsums count, not only those that `find_matmuls` lists.
    """
    axes: dict[str, list[int]] = {}
    for use, axis in collect(program, Group.ORTHOGONAL).reads:
        # a matrix that is computed from weights is none itself
        if program.weight(use) is not None and read.is_floating(use):
            axes.setdefault(use.name, []).append(axis)
    return {n.name: tuple(sorted(axes[n.name])) for n in program.graph.nodes if n.name in axes}
