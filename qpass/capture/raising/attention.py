"""Which products around a softmax are attention."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Program, edit, read
from qpass.ir.match import (
    Match,
    Miss,
    Num,
    Pattern,
    Var,
    Where,
    call,
    commutative,
    either,
    match,
    unscaled,
)

aten = torch.ops.aten

_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


def _product(x: Pattern, y: Pattern) -> Pattern:
    return either(
        call(aten.matmul.default, self=x, other=y),
        call(aten.bmm.default, self=x, mat2=y),
    )


# scale * (q @ k^T), perhaps plus a mask, perhaps with some entries at minus infinity
_RAW = _product(Var("q"), Var("k_t"))
_SCALED = either(
    commutative(aten.mul.Tensor, _RAW, Num("scale")),
    call(aten.div.Tensor, self=_RAW, other=Num("divisor")),
    _RAW,
)
_SUM = Where(commutative(aten.add.Tensor, _SCALED, Var("mask", seen=True)), unscaled)
_FILLED = call(
    aten.masked_fill.Scalar, self=_SCALED, mask=Var("hidden"), value=Num(value=float("-inf"))
)
_FUSED = call(
    aten.baddbmm.default,
    self=Var("mask", seen=True),
    batch1=Var("q"),
    batch2=Var("k_t"),
    beta=Num("beta"),
    alpha=Num("scale"),
)
_SCORES = either(_SUM, _FILLED, _FUSED, _SCALED)


def _raise_attention(program: Program, softmax: fx.Node) -> Note | None:
    """Replace `softmax(scale * q @ k^T + mask) @ v` by one operator."""
    where = read.module_path(softmax)
    found, readers = match(_SCORES, read.value(softmax, "self")), read.readers(softmax)
    if isinstance(found, Miss):
        if not any(read.calls(reader, *_PRODUCTS) for reader in readers):
            return None
        return Note(done=False, where=where, why=f"not attention: {found.why}")
    if len(readers) != 1 or not read.calls(readers[0], *_PRODUCTS):
        return Note(
            done=False, where=where, why="the attention weights are used for more than a product"
        )
    (root,) = readers
    v = read.uncast(read.value(root, "mat2" if read.calls(root, aten.bmm.default) else "other"))
    if (why := _refusal(softmax, root, v, found)) is not None:
        return Note(done=False, where=where, why=f"not attention: {why}")
    q, kind = found.node("q"), read.dtype(v)
    mask = _mask(program, root, found)
    if mask is not None and read.dtype(mask) not in (torch.bool, kind):
        return Note(done=False, where=where, why="the mask has another precision than the values")
    attention = edit.call(
        program,
        root,
        aten.scaled_dot_product_attention.default,
        q,
        _keys(program, root, found.node("k_t")),
        v,
        mask,
        scale=_scale(found),
    )
    if kind != read.dtype(root):
        attention = edit.call(program, root, aten.to.dtype, attention, read.dtype(root))
    edit.replace(root, attention)
    return Note(done=True, where=where, why="raised to aten.scaled_dot_product_attention")


def _refusal(softmax: fx.Node, root: fx.Node, v: fx.Node, found: Match) -> str | None:
    q, k_t = found.node("q"), found.node("k_t")
    if read.flat_axis(softmax, read.integer(softmax, "dim")) != len(read.shape(softmax)) - 1:
        return "the softmax is not over the keys"
    if read.uncast(cast("fx.Node", read.argument(root, "self"))) is not softmax:
        return "the attention weights are the right operand"
    if not len(read.shape(q)) == len(read.shape(k_t)) == len(read.shape(v)) >= 3:
        return "queries, keys and values have different numbers of axes"
    if not read.has_shape(softmax, (*read.shape(q)[:-1], read.shape(k_t)[-1])):
        return "the mask or the keys broadcast the queries"
    if not all(read.has_shape(x, (*read.shape(q)[:-2], *read.shape(x)[-2:])) for x in (k_t, v)):
        return "keys or values are shared by broadcasting"
    if not read.dtype(q) == read.dtype(k_t) == read.dtype(v):
        return "queries, keys and values have different precisions"
    if "beta" in found and found.number("beta") != 1:
        return "the mask is scaled"
    return None


def _scale(found: Match) -> float:
    if "scale" in found:
        return found.number("scale")
    return 1 / found.number("divisor") if "divisor" in found else 1.0


def _mask(program: Program, before: fx.Node, found: Match) -> fx.Node | None:
    if "hidden" in found:
        return edit.call(program, before, aten.logical_not.default, found.node("hidden"))
    if "mask" not in found:
        return None
    mask = found.node("mask")
    bare = read.uncast(mask)
    return bare if read.dtype(bare) == read.dtype(found.node("q")) else mask


def _keys(program: Program, before: fx.Node, k_t: fx.Node) -> fx.Node:
    """The keys whose transpose `k_t` is."""
    if read.calls(k_t, aten.transpose.int):
        last = len(read.shape(k_t)) - 1
        axes = {read.flat_axis(k_t, read.integer(k_t, name)) for name in ("dim0", "dim1")}
        if axes == {last - 1, last}:
            return read.value(k_t, "self")
    return edit.call(program, before, aten.transpose.int, k_t, -2, -1)


RAISINGS.add(Raising("attention", _SOFTMAX, _raise_attention))
