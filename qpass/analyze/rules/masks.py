"""Values of which some entries are replaced, and values that are zero in every basis."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.rules.base import rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten

_CONSTANT = "a constant replaces every entry"


@rule(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(node: fx.Node, c: Constraints) -> None:
    c.give_fresh(node)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def _where(node: fx.Node, c: Constraints) -> None:
    mask = c.layout(read.value(node, "condition"))
    sides = [read.optional_value(node, name) for name in ("self", "other")]
    numbers = [read.number(node, name) for name in ("self", "other")]
    _replace(node, c, mask, [s for s in sides if s is not None], [n for n in numbers if n])


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _fill(node: fx.Node, c: Constraints) -> None:
    mask, value = c.layout(read.value(node, "mask")), read.optional_value(node, "value")
    number = read.number(node, "value")
    sides = [read.value(node, "self"), *([value] if value is not None else [])]
    _replace(node, c, mask, sides, [number] if number else [])


def _replace(
    node: fx.Node, c: Constraints, mask: Layout, sides: list[fx.Node], numbers: list[float]
) -> None:
    """Each entry is that of one of the sides or numbers; `numbers` are those that are not zero."""
    if not read.is_floating(node) or not all(map(read.is_floating, sides)):
        for side in sides:
            c.pin_all(side, "is chosen among integers")
        c.give_fresh(node)
        c.pin_all(node, "is chosen among integers")
        return
    out: Layout = c.layout(sides[0])
    for side in sides[1:]:
        out = merge(c, out, c.layout(side), constant=_CONSTANT)
    out = ((),) * (len(read.shape(node)) - len(out)) + out
    for axis in out:
        if numbers:
            c.limit(axis, _CONSTANT, Group.ORTHOGONAL_ONES)
    mask = ((),) * (len(out) - len(mask)) + mask
    if not c.allows(Group.DIAGONAL):
        # a scaled entry is chosen as it was; any other change has to move the mask, too
        merge(c, out, mask, constant=None)
    c.give(node, [axis or own for axis, own in zip(out, mask, strict=True)])
