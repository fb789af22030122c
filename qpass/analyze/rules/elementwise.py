"""Operators that act on each entry by itself."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import cast

import torch
from torch import fx

from qpass.analyze.atoms import Axis, raised
from qpass.analyze.constraints import Constraints
from qpass.analyze.gains import Gain, find_gain
from qpass.analyze.rules.base import is_new, rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import Ones, read
from qpass.rotations import Group

aten = torch.ops.aten

_HOMOGENEOUS = (Group.PERMUTATION, Group.POSITIVE_DIAGONAL)


@rule(
    aten.silu.default,
    aten.gelu.default,
    aten.sigmoid.default,
    aten.softplus.default,
    aten.exp.default,
    aten.cos.default,
    aten.elu.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.relu6.default,
    aten.selu.default,
    aten.celu.default,
    aten.log.default,
    aten.log1p.default,
    aten.expm1.default,
    aten.log_sigmoid.default,
    aten.logit.default,
)
def _nonlinear(node: fx.Node, c: Constraints) -> None:
    _unary(node, c, Group.PERMUTATION)


@rule(aten.relu.default, aten.leaky_relu.default, aten.abs.default)
def _homogeneous(node: fx.Node, c: Constraints) -> None:
    _unary(node, c, *_HOMOGENEOUS)


@rule(
    aten.tanh.default,
    aten.sin.default,
    aten.erf.default,
    aten.atan.default,
    aten.sinh.default,
    aten.asinh.default,
    aten.softshrink.default,
    aten.sign.default,
)
def _odd(node: fx.Node, c: Constraints) -> None:
    _unary(node, c, Group.PERMUTATION, Group.SIGNS)


_POWERS: dict[object, Fraction] = {
    aten.square.default: Fraction(2),
    aten.sqrt.default: Fraction(1, 2),
    aten.rsqrt.default: Fraction(-1, 2),
}


@rule(aten.pow.Tensor_Scalar, *_POWERS)
def _power(node: fx.Node, c: Constraints) -> None:
    """`(d x)^p = d^p x^p` for a positive `d`."""
    exponent = _POWERS.get(node.target) or read.number(node, "exponent")
    if exponent and not c.allows(Group.PERMUTATION) and c.allows(Group.POSITIVE_DIAGONAL):
        layout = c.layout(read.value(node, "self"))
        c.give(node, [raised(axis, Fraction(exponent)) for axis in layout])
        return
    odd = exponent is not None and exponent % 2 == 1
    _unary(node, c, Group.PERMUTATION, *([Group.SIGNS] if odd else []))


@rule(aten.reciprocal.default)
def _reciprocal(node: fx.Node, c: Constraints) -> None:
    layout = c.layout(read.value(node, "self"))
    c.give(node, [_inverse(axis, c, "its reciprocal is taken") for axis in layout])


def _inverse(axis: Axis, c: Constraints, why: str) -> Axis:
    """The axis of a value one over which is taken, entry by entry."""
    c.limit(axis, why, Group.PERMUTATION, Group.DIAGONAL)
    return axis if c.allows(Group.PERMUTATION) else raised(axis, -1)


@rule(aten.clamp.default)
def _clamp(node: fx.Node, c: Constraints) -> None:
    low, high = read.argument(node, "min"), read.argument(node, "max")
    if (low, high) in ((0, None), (None, 0)):
        _unary(node, c, *_HOMOGENEOUS)
    elif isinstance(low, int | float) and isinstance(high, int | float) and low == -high:
        _unary(node, c, Group.PERMUTATION, Group.SIGNS)
    else:
        _unary(node, c, Group.PERMUTATION)


def _unary(node: fx.Node, c: Constraints, *groups: Group) -> None:
    source = next(iter(node.all_input_nodes))
    if not read.is_floating(source) or len(node.all_input_nodes) > 1:
        _pin_both(node, c, f"{read.target_name(node)} of more than one value")
        return
    for axis in c.layout(source):
        c.limit(axis, f"{read.target_name(node)} acts on each entry", *groups)
    c.give(node, c.layout(source))


@rule(aten.maximum.default, aten.minimum.default)
def _extreme(node: fx.Node, c: Constraints) -> None:
    left, right = read.value(node, "self"), read.value(node, "other")
    if not _real(left, right):
        _pin_both(node, c, "is compared with integers")
        return
    out = merge(c, c.layout(left), c.layout(right), constant="one value meets every entry")
    for axis in out:
        c.limit(axis, "the larger or smaller entry is taken", *_HOMOGENEOUS)
    c.give(node, out)


@rule(aten.rsub.Scalar)
def _subtract_from(node: fx.Node, c: Constraints) -> None:
    source = read.value(node, "self")
    if read.number(node, "other") != 0.0:
        for axis in c.layout(source):
            c.limit(axis, "a constant is added to every entry", Group.ORTHOGONAL_ONES)
    c.give(node, c.layout(source))


@rule(aten.linalg_vector_norm.default)
def _length(node: fx.Node, c: Constraints) -> None:
    source = read.value(node, "self")
    layout = c.layout(source)
    given = cast("Sequence[int] | None", read.argument(node, "dim"))
    dims = {int(d) % len(layout) for d in (range(len(layout)) if given is None else given)}
    euclidean = read.number(node, "ord") == 2.0
    for dim, axis in enumerate(layout):
        if dim not in dims:
            c.limit(axis, "a length is taken of each row", *_HOMOGENEOUS)
            continue
        kept = [Group.ORTHOGONAL] if euclidean else [Group.PERMUTATION, Group.SIGNS]
        c.limit(axis, "a length is taken of it", *kept)
        c.mix(layout, dim)
    keep = read.argument(node, "keepdim") is True
    c.give(node, [() if d in dims else a for d, a in enumerate(layout) if keep or d not in dims])


@rule(aten.neg.default)
def _negate(node: fx.Node, c: Constraints) -> None:
    c.give(node, c.layout(read.value(node, "self")))


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor)
def _add(node: fx.Node, c: Constraints) -> None:
    left, right = read.value(node, "self"), _tensor(node, "other")
    if right is None:
        if read.number(node, "other") != 0.0:
            for axis in c.layout(left):
                c.limit(axis, "a constant is added to every entry", Group.ORTHOGONAL_ONES)
        c.give(node, c.layout(left))
        return
    if not read.is_floating(node):
        _pin_both(node, c, "is added as integers")
        return
    c.give(
        node,
        merge(c, c.layout(left), c.layout(right), constant="one value is added to every entry"),
    )


@rule(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.mul_.Tensor)
def _multiply(node: fx.Node, c: Constraints) -> None:
    left, right = read.value(node, "self"), _tensor(node, "other")
    if right is None:
        c.give(node, c.layout(left))
        return
    if not read.is_floating(node):
        _pin_both(node, c, "is multiplied as integers")
        return
    if (found := find_gain(c.program, node)) is not None and _gained(node, found, c):
        return
    a, b = c.layout(left), c.layout(right)
    rank = max(len(a), len(b))
    a, b = ((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b
    # integers have no basis; what is multiplied with or divided by them may still be scaled
    mixed = not _real(left, right) and c.allows(Group.DIAGONAL)
    if mixed and node.target is aten.div.Tensor:
        mixed = _real(left) or c.allows(Group.SIGNS)
    what = "is multiplied entry by entry"
    out: list[Axis] = []
    for x, y in zip(a, b, strict=True):
        # where the other operand has one entry, the product scales whole rows: any change commutes
        if x and y and mixed:
            out.append(x if _real(left) else y)
            continue
        if y and node.target is aten.div.Tensor:
            y = _inverse(y, c, "is divided by entry by entry")
        out.append(c.multiply(x, y, what) if x and y else x or y)
    c.give(node, out)


def _gained(node: fx.Node, found: Gain, c: Constraints) -> bool:
    """A gain writes the product: a diagonal change of the product is a change of the gain."""
    layout = c.layout(found.value)
    if is_new(found.gain, Ones, c):
        c.pin_all(found.gain, "was folded away")
        c.give(node, layout)
        return True
    if c.allows(Group.PERMUTATION) or not c.allows(Group.DIAGONAL):
        return False
    c.pin(layout[-1], "is multiplied entry by entry")
    c.give(node, (*layout[:-1], c.layout(found.gain)[0]))
    return True


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(node: fx.Node, c: Constraints) -> None:
    layout = c.layout(read.value(node, "self"))
    for axis in layout:
        c.limit(axis, "softmax acts on each entry", Group.PERMUTATION)
    c.mix(layout, read.integer(node, "dim"))
    c.give(node, layout)


@rule(aten.mean.dim, aten.sum.dim_IntList)
def _reduce(node: fx.Node, c: Constraints) -> None:
    source = read.value(node, "self")
    if not _real(source, node):
        _pin_both(node, c, "is summed as integers")
        return
    layout = c.layout(source)
    given = read.argument(node, "dim") or range(len(layout))
    dims = {int(d) % len(layout) for d in cast("Sequence[int]", given)}
    keep = read.argument(node, "keepdim") is True
    for dim in dims:
        c.limit(layout[dim], "is summed over", Group.ORTHOGONAL_ONES)
        c.mix(layout, dim)
    c.give(
        node,
        [() if d in dims else axis for d, axis in enumerate(layout) if keep or d not in dims],
    )


def _tensor(node: fx.Node, name: str) -> fx.Node | None:
    """The tensor passed as `name`; None for a number, known or symbolic."""
    found = read.optional_value(node, name)
    return None if found is None or read.fake(found) is None else found


def _real(*nodes: fx.Node) -> bool:
    return all(read.is_floating(n) for n in nodes)


def _pin_both(node: fx.Node, c: Constraints, why: str) -> None:
    for touched in node.all_input_nodes:
        if touched in c.layouts:
            c.pin_all(touched, why)
    c.give_fresh(node)
    c.pin_all(node, why)
