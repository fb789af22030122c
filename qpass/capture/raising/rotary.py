"""Which products with cosines and sines turn pairs of channels: rotary position embeddings."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.capture.raising.halves import Half, half_of, is_view_of_pairs, joined_halves
from qpass.ir import Note, Program, edit, read
from qpass.ir.match import Miss, Same, Var, Where, commutative, match, unscaled
from qpass.ops import structure

aten = torch.ops.aten

_RAISED = "raised to qpass.rotary"


def _raise_rotary(program: Program, anchor: fx.Node) -> Note | None:
    """Replace a rotation of channel pairs, in any of its spellings, by one operator."""
    if read.calls(anchor, aten.view_as_complex.default):
        return _raise_complex(program, anchor)
    joined = joined_halves(anchor)
    if joined is None:
        return None
    first, second = read.uncast(joined.first), half_of(joined.second)
    if read.calls(first, aten.neg.default):
        minus = half_of(read.value(first, "self"))
        if minus is None or second is None or not minus.second or second != minus.other():
            return None
        if minus.interleaved is not joined.interleaved:
            return None
        return _raise_turned(program, joined.whole, minus)
    if read.calls(first, aten.sub.Tensor):
        return _raise_planes(program, joined.whole, (first, read.uncast(joined.second)))
    return None


def _raise_turned(program: Program, turned: fx.Node, half: Half) -> Note:
    """`x * cos + turned * sin`, where `turned` is `x` with each pair turned by a right angle."""
    form = Where(
        commutative(
            aten.add.Tensor,
            commutative(aten.mul.Tensor, Same(half.x), Var("cos", seen=True)),
            commutative(aten.mul.Tensor, Same(turned), Var("sin", seen=True)),
        ),
        unscaled,
    )
    why = "nothing is added to a product with the turned channels"
    for root in [root for product in read.readers(turned) for root in read.readers(product)]:
        found = match(form, root)
        if isinstance(found, Miss):
            why = found.why
            continue
        return _put(program, root, half, (found.node("cos"), found.node("sin")))
    return _declined(turned, why)


def _raise_planes(program: Program, root: fx.Node, parts: tuple[fx.Node, fx.Node]) -> Note | None:
    """`x1 * cos - x2 * sin` joined with `x2 * cos + x1 * sin`: one angle for each pair."""
    minus, plus = (_products(part) for part in parts)
    if not minus or not plus or not read.calls(parts[1], aten.add.Tensor):
        return None
    for (half, cos), (other, sin) in itertools.product(*minus):
        crossed = {(other, read.uncast(cos)), (half, read.uncast(sin))}
        if half.second or other != half.other():
            continue
        if any(
            {(h, read.uncast(a)) for h, a in pair} == crossed for pair in itertools.product(*plus)
        ):
            angles = _for_each_channel(program, root, half, (cos, sin))
            return _put(program, root, half, angles)
    return _declined(root, "the sum does not cross the halves of the difference")


def _raise_complex(program: Program, anchor: fx.Node) -> Note | None:
    """Pairs read as complex numbers, multiplied with others, and read back as pairs."""
    pairs = read.uncast(read.value(anchor, "self"))
    if not is_view_of_pairs(pairs):
        return None
    half = Half(read.uncast(read.value(pairs, "self")), second=False, interleaved=True)
    for product in anchor.users:
        if not read.calls(product, aten.mul.Tensor):
            continue
        for back in product.users:
            if not read.calls(back, aten.view_as_real.default) or len(back.users) != 1:
                continue
            (root,) = back.users
            others = [n for n in product.all_input_nodes if n is not anchor]
            if len(others) != 1 or not read.same_shape(root, half.x):
                continue
            real = edit.call(program, root, aten.view_as_real.default, others[0])
            cos, sin = (edit.call(program, root, aten.select.int, real, -1, i) for i in (0, 1))
            return _put(program, root, half, _for_each_channel(program, root, half, (cos, sin)))
    return _declined(anchor, "the complex product is not read back as the same pairs")


def _products(node: fx.Node) -> list[list[tuple[Half, fx.Node]]]:
    """For each of the two products that `node` adds or subtracts: a half and its angle.

    Angles can be halves themselves, so there may be two readings of a product.
    """
    if not read.calls(node, aten.add.Tensor, aten.sub.Tensor) or unscaled(node) is not None:
        return []
    found: list[list[tuple[Half, fx.Node]]] = []
    for name in ("self", "other"):
        product = read.optional_value(node, name)
        product = None if product is None else read.uncast(product)
        if product is None or not read.calls(product, aten.mul.Tensor):
            return []
        a, b = (read.optional_value(product, side) for side in ("self", "other"))
        if a is None or b is None:
            return []
        readings = ((half_of(a), b), (half_of(b), a))
        found.append([(half, angle) for half, angle in readings if half is not None])
    return found


def _for_each_channel(
    program: Program, before: fx.Node, half: Half, angles: tuple[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Angles for each pair, as angles for each channel."""
    cos, sin = (
        edit.call(program, before, aten.repeat_interleave.self_int, angle, 2, -1)
        if half.interleaved
        else edit.call(program, before, aten.cat.default, [angle, angle], -1)
        for angle in angles
    )
    return cos, sin


def _put(program: Program, root: fx.Node, half: Half, angles: tuple[fx.Node, fx.Node]) -> Note:
    width = read.shape(half.x)[-1]
    if not read.same_shape(root, half.x):
        return _declined(root, "the angles broadcast the channels")
    if not all(read.same_size(read.shape(angle)[-1], width) for angle in angles):
        return _declined(root, "there is not one angle for each channel")
    kind = cast("torch.dtype", read.dtype(root))
    values = [_in(program, root, value, kind) for value in (half.x, *angles)]
    rotary = edit.respell(program, root, structure.ROTARY, *values, half.interleaved)
    where = read.module_path(root)
    edit.replace(root, rotary)
    return Note(done=True, where=where, why=_RAISED)


def _in(program: Program, before: fx.Node, value: fx.Node, kind: torch.dtype) -> fx.Node:
    for known in (value, read.uncast(value)):
        if read.dtype(known) == kind:
            return known
    return edit.call(program, before, aten.to.dtype, value, kind)


def _declined(node: fx.Node, why: str) -> Note:
    return Note(done=False, where=read.module_path(node), why=f"not a rotary embedding: {why}")


_ANCHORS = frozenset({aten.cat.default, aten.stack.default, aten.view_as_complex.default})

RAISINGS.add(Raising("rotary", _ANCHORS, _raise_rotary))
