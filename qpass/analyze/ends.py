"""Where a model begins and ends: look-up tables, and products that make its outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from qpass.analyze.matmuls import Matmul
from qpass.ir import Program, read

aten = torch.ops.aten


def find_tables(program: Program) -> tuple[str, ...]:
    """The uses of weights that are looked up by index, in graph order."""
    return tuple(
        table.name
        for node in program.graph.nodes
        if read.calls(node, aten.embedding.default)
        and program.weight(table := read.value(node, "weight")) is not None
    )


def find_heads(program: Program, matmuls: Iterable[Matmul]) -> frozenset[str]:
    """The products whose result is returned without meeting another value of its size.

    A last layer that is added to a residual stream is no head; one that is scaled, capped or
    reshaped on its way out is.
    """
    returned = set(program.outputs)
    return frozenset(m.node for m in matmuls if _reaches_output(program.node(m.node), returned))


def _reaches_output(node: fx.Node, returned: set[fx.Node]) -> bool:
    while node not in returned:
        users = list(node.users)
        if len(users) != 1:
            return False
        others = [n for n in users[0].all_input_nodes if n is not node and _larger(n)]
        if others or users[0].op == "output":
            return users[0].op == "output"
        node = users[0]
        if read.fake(node) is None:
            return False
    return True


def _larger(node: fx.Node) -> bool:
    found = read.fake(node)
    return found is not None and found.dim() > 1
