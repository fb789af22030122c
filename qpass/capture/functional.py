"""Which writes in place are the same as making a new value."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from qpass.ir import Program, edit, read
from qpass.ir.alias import memory


def make_functional(program: Program) -> None:
    """Replace each write to a value that is read through no view of it by a new value.

    Writes to inputs (a cache) are part of what the graph does and stay.
    """
    for node in list(program.graph.nodes):
        written = read.written(node) if read.writes(node) else ()
        pure = _pure(node)
        if len(written) != 1 or pure is None:
            continue
        (value,) = written
        if memory(value) is value and value.op != "placeholder" and not _seen_later(node, value):
            edit.write_as_value(program, node, value, pure)


def _pure(node: fx.Node) -> OpOverload | None:
    """The operator that makes what `node` writes, or None."""
    op = read.operator(node)
    if op is None:
        return None
    space, _, name = op._schema.name.partition("::")
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    overload = op._overloadname
    if packet is None or overload not in packet.overloads():
        return None
    return getattr(packet, overload)


def _seen_later(write: fx.Node, value: fx.Node) -> bool:
    """Whether a view of `value` made before `write` is read after it."""
    place = {node: index for index, node in enumerate(write.graph.nodes)}
    views = (
        node
        for node in write.graph.nodes
        if node is not value and place[node] < place[write] and memory(node) is value
    )
    return any(place[user] > place[write] for view in views for user in view.users)
