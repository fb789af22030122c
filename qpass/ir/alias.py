"""Which values share memory, and which memory a graph writes to."""

from __future__ import annotations

import operator as python

from torch import fx

from qpass.ir import read


def memory(node: fx.Node) -> fx.Node:
    """The value whose memory `node` is a view of; itself where it has its own."""
    while (viewed := _viewed(node)) is not None:
        node = viewed
    return node


def written_memory(graph: fx.Graph) -> frozenset[fx.Node]:
    """The values whose memory some node of the graph writes to."""
    return frozenset(
        memory(value) for node in graph.nodes if read.writes(node) for value in read.written(node)
    )


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the result of `node` may be, or None."""
    if node.target is python.getitem:
        source = read.plain_arguments(node)[0]
        return source if isinstance(source, fx.Node) and _may_share(source) else None
    op = read.operator(node)
    if op is None:
        return None
    shared = {name for r in op._schema.returns if r.alias_info for name in r.alias_info.before_set}
    for declared in op._schema.arguments:
        info = declared.alias_info
        # the schema marks a list of views on its argument instead
        if info is None or not (shared & set(info.before_set) or "*" in info.after_set):
            continue
        value = read.argument(node, declared.name)
        if isinstance(value, fx.Node):
            return value
    return None


def _may_share(several: fx.Node) -> bool:
    """Whether the values of which a node returns several may be views."""
    op = read.operator(several)
    if op is None:
        return True
    marks = (*op._schema.returns, *op._schema.arguments)
    return any(mark.alias_info is not None for mark in marks)
