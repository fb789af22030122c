"""Normalisations: which basis changes commute with them, and what their gains allow."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.atoms import fresh, size_of
from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.rules.base import rule
from qpass.ir import Ones, Zeros, read
from qpass.rotations import Group

aten = torch.ops.aten


@rule(aten.rms_norm.default)
def _rms_norm(node: fx.Node, c: Constraints) -> None:
    _norm(node, c, "the root mean square", Group.ORTHOGONAL)


@rule(aten.layer_norm.default)
def _layer_norm(node: fx.Node, c: Constraints) -> None:
    _norm(node, c, "the mean and variance", Group.ORTHOGONAL_ONES)


def _norm(node: fx.Node, c: Constraints, what: str, core: Group) -> None:
    layout = c.layout(read.value(node, "input"))
    first = len(layout) - len(read.sizes(node, "normalized_shape"))
    affine = [
        weight
        for name, neutral in (("weight", Ones), ("bias", Zeros))
        if (weight := _affine(node, name)) is not None and not _is_new(weight, neutral, c)
    ]
    for dim in range(first, len(layout)):
        c.mix(layout, dim)
    if not affine and c.allows(core):
        c.give(node, layout)
        return
    if affine and c.allows(Group.PERMUTATION):
        _tie_affine(layout[first:], affine, c)
        c.give(node, layout)
        return
    why = "a norm's gain or bias acts on each entry" if affine else f"{what} must not change"
    out = [*layout[:first], *(fresh(size_of(s)) for s in read.shape(node)[first:])]
    for axis in layout[first:]:
        c.pin(axis, why)
    if affine and c.allows(Group.DIAGONAL):
        # the gain writes its output: a diagonal change of the output is a change of the gain
        _tie_affine(tuple(out[first:]), affine, c)
    else:
        for axis in out[first:]:
            c.pin(axis, why)
    c.give(node, out)


def _affine(node: fx.Node, name: str) -> fx.Node | None:
    declared = {a.name for a in getattr(node.target, "_schema").arguments}  # noqa: B009
    return read.optional_value(node, name) if name in declared else None


def _is_new(weight: fx.Node, neutral: type, c: Constraints) -> bool:
    """Whether a gain is all ones or a bias all zeros, because it was folded away."""
    known = c.program.weight(weight)
    return known is not None and bool(known.steps) and isinstance(known.steps[-1], neutral)


def _tie_affine(axes: Layout, affine: list[fx.Node], c: Constraints) -> None:
    for weight in affine:
        for axis, own in zip(axes, c.layout(weight), strict=True):
            c.tie(axis, own)
