"""Normalisations: which basis changes commute with them, and what their gains allow."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.atoms import fresh, size_of
from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.rules.base import is_new, rule
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
    gain, bias = _affine(node, "weight", Ones, c), _affine(node, "bias", Zeros, c)
    # without a bias, a row's sign passes through
    rows = (Group.PERMUTATION,) if bias else (Group.PERMUTATION, Group.SIGNS)
    for axis in layout[:first]:
        c.limit(axis, "each row is normalised by itself", *rows)
    for dim in range(first, len(layout)):
        c.mix(layout, dim)
    affine = [weight for weight in (gain, bias) if weight is not None]
    if not affine and c.allows(core):
        c.give(node, layout)
        return
    if c.allows(Group.PERMUTATION):
        _tie_affine(layout[first:], affine, c)
        c.give(node, layout)
        return
    why = "a norm's gain or bias acts on each entry" if affine else f"{what} must not change"
    if gain is not None and bias is None and c.allows(core) and c.allows(Group.DIAGONAL):
        # signs pass through the norm itself, and meet those of the gain
        scaled = zip(layout[first:], c.layout(gain), strict=True)
        c.give(node, (*layout[:first], *(c.multiply(x, own, why) for x, own in scaled)))
        return
    out = [*layout[:first], *(fresh(size_of(s)) for s in read.shape(node)[first:])]
    for axis in layout[first:]:
        c.pin(axis, why)
    if gain is None or not c.allows(Group.DIAGONAL):
        for axis in out[first:]:
            c.pin(axis, why)
    # the gain writes the output: a diagonal change of the output is a change of the gain
    _tie_affine(tuple(out[first:]), affine, c)
    c.give(node, out)


def _affine(node: fx.Node, name: str, neutral: type, c: Constraints) -> fx.Node | None:
    """A gain or bias, unless it is all ones or zeros because it was folded away."""
    declared = {a.name for a in getattr(node.target, "_schema").arguments}  # noqa: B009
    weight = read.optional_value(node, name) if name in declared else None
    if weight is None or not is_new(weight, neutral, c):
        return weight
    c.pin_all(weight, "was folded away")
    return None


def _tie_affine(axes: Layout, affine: list[fx.Node], c: Constraints) -> None:
    for weight in affine:
        for axis, own in zip(axes, c.layout(weight), strict=True):
            c.tie(axis, own)
