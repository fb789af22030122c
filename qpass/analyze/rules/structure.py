"""Structures of attention that capture has named: rotary positions, and repeated heads."""

from __future__ import annotations

from typing import cast

from torch import fx

from qpass.analyze.atoms import fresh
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.ir import read
from qpass.ops.structure import REPEAT_HEADS, ROTARY
from qpass.rotations import Group


@rule(ROTARY)
def _rotary(node: fx.Node, c: Constraints) -> None:
    x = read.value(node, "x")
    layout = c.layout(x)
    for name in ("cos", "sin"):
        angles = c.layout(read.value(node, name))
        c.pin(angles[-1], "each plane turns by its own angle")
        for axis, own in zip(reversed(layout[:-1]), reversed(angles[:-1]), strict=False):
            if own:
                c.limit(axis, "each entry turns by its own angle", Group.PERMUTATION)
                c.limit(own, "each entry turns by its own angle", Group.PERMUTATION)
                c.tie(axis, own)
    c.mix(layout, -1)
    width = read.shape(x)[-1]
    if not isinstance(width, int) or not c.allows(Group.ROPE_PLANES):
        c.pin(layout[-1], "each plane turns by its own angle")
        c.give(node, layout)
        return
    # turns and scales of a plane commute, so each plane may have a change of its own
    if read.argument(node, "interleaved") is True:
        planes, plane = c.view(layout[-1:], (width // 2, 2))
        last = (*planes, *plane)
    else:
        plane, planes = c.view(layout[-1:], (2, width // 2))
        last = (*plane, *planes)
    c.pin(planes, "each plane turns by its own angle")
    c.give(node, (*layout[:-1], last))


@rule(REPEAT_HEADS)
def _repeat_heads(node: fx.Node, c: Constraints) -> None:
    layout = c.layout(read.value(node, "x"))
    repeat = fresh(cast("int", read.argument(node, "n")))
    c.limit(repeat, "repeats one head", Group.ORTHOGONAL_ONES)
    c.give(node, (*layout[:1], (*layout[1], *repeat), *layout[2:]))
