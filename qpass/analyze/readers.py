"""Which weights are contracted with values, whatever the operator and the rank of the weight."""

from __future__ import annotations

from torch import fx

from qpass.analyze.atoms import Atom, Axis, placements
from qpass.analyze.rules.views import MOVES
from qpass.analyze.solution import collect
from qpass.ir import Program, read
from qpass.rotations import Group


def find_readers(program: Program) -> dict[str, tuple[int, ...]]:
    """The axes on which each use of a weight is summed over in a product, in graph order.

    Products of experts, convolutions and einsums count, not only those that `find_matmuls` lists,
    and so do those with a part of a weight.
    """
    c = collect(program, Group.ORTHOGONAL)
    axes: dict[str, set[int]] = {}
    for node, axis in c.reads:
        use = _weight(program, node)
        if use is None or not read.is_floating(use):
            continue
        leaves = _leaves(c.layouts[node][axis])
        own = {i for i, other in enumerate(c.layouts[use]) if leaves & _leaves(other)}
        axes.setdefault(use.name, set()).update({axis} if use is node else own)
    found = {n.name: tuple(sorted(axes.get(n.name, ()))) for n in program.graph.nodes}
    return {name: some for name, some in found.items() if some}


def _weight(program: Program, node: fx.Node) -> fx.Node | None:
    """The use of a weight whose entries a value holds."""
    while program.weight(node) is None:
        if not read.calls(node, *MOVES):
            return None
        node = node.all_input_nodes[0]
    return node


def _leaves(axis: Axis) -> frozenset[Atom]:
    return frozenset(place.leaf.atom for place in placements(axis))
