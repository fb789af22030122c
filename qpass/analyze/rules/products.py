"""Sums of products: linear maps, matrix products, table look-ups."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.rules.base import rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten

_CONSTANT = "one value is added to every entry"
_MEETS = "each entry of one meets the same entry of the other"


@rule(aten.linear.default)
def _linear(node: fx.Node, c: Constraints) -> None:
    x, weight = read.value(node, "input"), read.value(node, "weight")
    values, matrix = c.layout(x), c.layout(weight)
    c.contract(values, -1, matrix, -1)
    c.absorb(weight, len(matrix) - 1)
    out = (*values[:-1], *matrix[:-1])
    if (bias := read.optional_value(node, "bias")) is not None:
        out = merge(c, out, c.layout(bias), constant=_CONSTANT)
    c.give(node, out)


@rule(aten.addmm.default)
def _addmm(node: fx.Node, c: Constraints) -> None:
    added = read.value(node, "self")
    left, right = read.value(node, "mat1"), read.value(node, "mat2")
    a, b = c.layout(left), c.layout(right)
    _contract(left, right, c)
    out = (a[0], b[1])
    c.give(node, merge(c, out, c.layout(added), constant=_CONSTANT))


@rule(aten.baddbmm.default)
def _baddbmm(node: fx.Node, c: Constraints) -> None:
    left, right = read.value(node, "batch1"), read.value(node, "batch2")
    a, b = c.layout(left), c.layout(right)
    _contract(left, right, c)
    for axis in (a[0], b[0]):
        c.limit(axis, _MEETS, Group.PERMUTATION)
    out = (*merge(c, a[:1], b[:1], constant=None), a[1], b[2])
    c.give(node, merge(c, out, c.layout(read.value(node, "self")), constant=_CONSTANT))


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default)
def _matmul(node: fx.Node, c: Constraints) -> None:
    names = ("self", "other") if node.target is aten.matmul.default else ("self", "mat2")
    left, right = read.value(node, names[0]), read.value(node, names[1])
    a, b = c.layout(left), c.layout(right)
    _contract(left, right, c)
    rows: Layout = a[-2:-1]
    columns: Layout = b[-1:] if len(b) > 1 else ()
    for x, y in zip(reversed(a[:-2]), reversed(b[:-2]), strict=False):
        if x and y:
            c.limit(x, _MEETS, Group.PERMUTATION)
            c.limit(y, _MEETS, Group.PERMUTATION)
    batch = merge(c, a[:-2], b[:-2], constant=None)
    c.give(node, (*batch, *rows, *columns))


def _contract(left: fx.Node, right: fx.Node, c: Constraints) -> None:
    a, b = c.layout(left), c.layout(right)
    inner = max(len(b) - 2, 0)
    c.contract(a, -1, b, inner)
    if c.program.weight(right) is not None:
        c.absorb(right, inner)
    elif c.program.weight(left) is not None:
        c.absorb(left, len(a) - 1)


@rule(aten.embedding.default)
def _embedding(node: fx.Node, c: Constraints) -> None:
    table, indices = c.layout(read.value(node, "weight")), read.value(node, "indices")
    c.pin(table[0], "is looked up by index")
    c.give(node, (*c.layout(indices), table[1]))
