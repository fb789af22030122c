"""Which chains of powers, means and roots are an RMSNorm or LayerNorm over the last axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Program, Reshape, edit, read
from qpass.ir.match import (
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

_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


def _over_last_axis(node: fx.Node) -> str | None:
    why = _of_last_axis(node)
    if why is None and not read.argument(node, "keepdim"):
        return f"{read.target_name(node)} drops the axis it reduces"
    return why


def _without_last_axis(node: fx.Node) -> str | None:
    why = _of_last_axis(node)
    return "the axis comes back twice" if why is None and read.argument(node, "keepdim") else why


def _of_last_axis(node: fx.Node) -> str | None:
    dims = read.argument(node, "dim")
    axes = [dims] if isinstance(dims, int) else list(cast("list[int]", dims or []))
    last = len(read.shape(read.value(node, "self"))) - 1
    if [axis % (last + 1) for axis in axes] != [last]:
        return f"{read.target_name(node)} is over axes {axes}, not over the last one"
    return None


def _brought_back(node: fx.Node) -> str | None:
    last = len(read.shape(node)) - 1
    return None if read.integer(node, "dim") % (last + 1) == last else "another axis is added"


def _back(v: Pattern) -> Pattern:
    """A value with a last axis of one entry."""
    return Where(call(aten.unsqueeze.default, self=v), _brought_back)


def _biased(node: fx.Node) -> str | None:
    if read.calls(node, aten.var.dim):
        biased = read.argument(node, "unbiased") is False
    else:
        biased = read.argument(node, "correction") == 0
    return _over_last_axis(node) if biased else "the variance divides by n - 1"


def _mean(v: Pattern, over: Callable[[fx.Node], str | None] = _over_last_axis) -> Pattern:
    total = Where(call(aten.sum.dim_IntList, self=v), over)
    return either(
        Where(call(aten.mean.dim, self=v), over),
        call(aten.div.Tensor, self=total, other=Num("width")),
    )


def _square(v: Pattern) -> Pattern:
    return either(
        call(aten.pow.Tensor_Scalar, self=v, exponent=Num(value=2)),
        call(aten.mul.Tensor, self=v, other=v),
        call(aten.square.default, self=v),
    )


def _normalised(
    v: Pattern, variance: Pattern, back: Callable[[Pattern], Pattern] | None = None
) -> Pattern:
    """`v / sqrt(variance + eps)` in its spellings; `back` brings back an axis at the end."""
    moved = Where(call(aten.add.Tensor, self=variance, other=Num("eps")), unscaled)
    root = either(
        call(aten.sqrt.default, self=moved),
        call(aten.pow.Tensor_Scalar, self=moved, exponent=Num(value=0.5)),
    )
    inverse = either(
        call(aten.rsqrt.default, self=moved),
        call(aten.pow.Tensor_Scalar, self=moved, exponent=Num(value=-0.5)),
        call(aten.reciprocal.default, self=root),
        call(aten.pow.Tensor_Scalar, self=root, exponent=Num(value=-1)),
    )
    if back is not None:
        inverse, root = back(inverse), back(root)
    return either(
        commutative(aten.mul.Tensor, v, inverse),
        call(aten.div.Tensor, self=v, other=root),
    )


_X = Var("x")
_CENTRED = Where(call(aten.sub.Tensor, self=_X, other=_mean(_X)), unscaled)
_VARIANCE = either(
    _mean(_square(_CENTRED)),
    Where(call(aten.var.correction, self=_X), _biased),
    Where(call(aten.var.dim, self=_X), _biased),
)

# a mean whose axis is dropped, and comes back before or after the root is taken
_SHORT = _mean(_square(_X), _without_last_axis)

# a LayerNorm is also an RMSNorm of its centred input, so it is tried first
_FORMS: tuple[tuple[OpOverload, Pattern], ...] = (
    (aten.layer_norm.default, _normalised(_CENTRED, _VARIANCE)),
    (aten.rms_norm.default, _normalised(_X, _mean(_square(_X)))),
    (aten.rms_norm.default, _normalised(_X, _back(_SHORT))),
    (aten.rms_norm.default, _normalised(_X, _SHORT, _back)),
)


def _raise_norm(program: Program, anchor: fx.Node) -> Note | None:
    """Replace `x / sqrt(mean(x * x) + eps)`, centred or not, by one operator without gain."""
    if read.calls(anchor, aten.pow.Tensor_Scalar) and read.number(anchor, "exponent") not in (
        -0.5,
        0.5,
    ):
        return None
    where = read.module_path(anchor)
    missed = Miss("nothing is multiplied with or divided by the root")
    for root in _products(anchor):
        for operator, form in _FORMS:
            found = match(form, root)
            if isinstance(found, Miss):
                missed = found if found.depth >= missed.depth else missed
                continue
            x = found.node("x")
            width = read.shape(x)[-1]
            if not isinstance(width, int):
                missed = Miss("the normalised axis has no fixed length")
                continue
            if "width" in found and found.number("width") != width:
                missed = Miss("the sum of squares is not divided by the length of the axis")
                continue
            if not read.same_shape(x, root):
                missed = Miss("the norm's input is broadcast")
                continue
            kind = cast("torch.dtype", read.dtype(root))
            norm = _Norm(operator, x, width, found.number("eps")).emit(program, root, kind)
            edit.replace(root, norm)
            return Note(done=True, where=where, why=f"raised to {operator}")
    return Note(done=False, where=where, why=f"not a norm: {missed.why}")


def _products(anchor: fx.Node) -> tuple[fx.Node, ...]:
    """The products and quotients that read `anchor`, perhaps through a reciprocal or a view."""
    found: list[fx.Node] = []
    for reader in read.readers(anchor):
        between = read.calls(reader, aten.reciprocal.default, aten.unsqueeze.default) or (
            read.calls(reader, aten.pow.Tensor_Scalar) and read.number(reader, "exponent") == -1
        )
        found += _products(reader) if between else [reader]
    return tuple(n for n in found if read.calls(n, aten.mul.Tensor, aten.div.Tensor))


def _absorb(program: Program, node: fx.Node) -> Note | None:
    """Give a norm the gain and bias that follow it, a plain epsilon, and its input's precision."""
    if len(read.sizes(node, "normalized_shape")) != 1:
        return None
    where, norm, taken = read.module_path(node), _parse(node), list[str]()
    while (reader := _only_reader(node)) is not None:
        grown = _take(program, norm, reader)
        if grown is None:
            break
        norm = grown
        node = _put(program, norm, reader, cast("torch.dtype", read.dtype(reader)))
        taken.append("a gain" if norm.bias is None else "a bias")
    kind = _natural(program, norm, node)
    if kind is not None:
        readers = list(node.users)
        node = _put(program, norm, node, kind)
        for reader in readers:
            edit.replace(reader, node)
    elif read.argument(node, "eps") is None:
        node = _put(program, norm, node, cast("torch.dtype", read.dtype(node)))
    if not taken:
        return None
    return Note(done=True, where=where, why=f"the norm takes {' and '.join(taken)}")


@final
@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm over the last axis, of length `width`, apart from the precision it runs in."""

    operator: OpOverload
    x: fx.Node
    width: int
    eps: float
    weight: fx.Node | None = None
    bias: fx.Node | None = None

    def emit(self, program: Program, before: fx.Node, kind: torch.dtype) -> fx.Node:
        """Insert this norm, computed on and returned in elements of `kind`."""
        x = read.uncast(self.x)
        if read.dtype(x) != kind:
            x = edit.call(program, before, aten.to.dtype, x, kind)
        weight, bias = (
            None if use is None else _vector(program, use, self.width, kind)
            for use in (self.weight, self.bias)
        )
        parts = (weight,) if self.operator is aten.rms_norm.default else (weight, bias)
        arguments = (x, [self.width], *parts, self.eps)
        if read.dtype(before) == kind:
            return edit.respell(program, before, self.operator, *arguments)
        return edit.call(program, before, self.operator, *arguments)


def _parse(node: fx.Node) -> _Norm:
    x, layer = read.value(node, "input"), read.calls(node, aten.layer_norm.default)
    eps = read.number(node, "eps")
    if eps is None:
        # what PyTorch computes with: the epsilon of the type it accumulates in
        wide = read.dtype(x) == torch.float64
        eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    return _Norm(
        aten.layer_norm.default if layer else aten.rms_norm.default,
        x,
        cast("int", read.shape(x)[-1]),
        eps,
        read.optional_value(node, "weight"),
        read.optional_value(node, "bias") if layer else None,
    )


def _put(program: Program, norm: _Norm, old: fx.Node, kind: torch.dtype) -> fx.Node:
    new = norm.emit(program, old, kind)
    edit.replace(old, new)
    return new


def _take(program: Program, norm: _Norm, reader: fx.Node) -> _Norm | None:
    """`norm` with the weight that `reader` multiplies with or adds, or None."""
    gain = read.calls(reader, aten.mul.Tensor) and norm.weight is None and norm.bias is None
    bias = (
        read.calls(reader, aten.add.Tensor)
        and norm.operator is aten.layer_norm.default
        and norm.bias is None
        and unscaled(reader) is None
    )
    operands = [n for n in reader.all_input_nodes if program.weight(n) is not None]
    if not (gain or bias) or len(operands) != 1 or not _is_vector(operands[0], norm.width):
        return None
    if not read.same_shape(norm.x, reader):
        return None
    return replace(norm, weight=operands[0]) if gain else replace(norm, bias=operands[0])


def _is_vector(use: fx.Node, width: int) -> bool:
    shape = read.static_shape(use)
    return shape is not None and shape[-1:] == (width,) and math.prod(shape) == width


def _vector(program: Program, use: fx.Node, width: int, kind: torch.dtype) -> fx.Node:
    """The use itself, or the same weight as `[width]` in elements of `kind`."""
    like = cast("Tensor", read.fake(use))
    if tuple(like.shape) == (width,) and like.dtype == kind:
        return use
    weight, owner = program.weights[use.name], program.owners.get(use.name)
    if tuple(like.shape) != (width,):
        step = Reshape((width,))
        weight = weight.then(step)
        owner = None if owner is None else replace(owner, prefix=(*owner.prefix, step))
    return edit.derive_use(program, use, weight, like.reshape(width).to(kind), owner)


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads a value, looking through casts that nothing else reads."""
    while len(node.users) == 1:
        (reader,) = node.users
        if read.uncast(reader) is reader:
            return reader
        node = reader
    return None


def _natural(program: Program, norm: _Norm, node: fx.Node) -> torch.dtype | None:
    """The narrow element type of the input, where everything around the norm has it."""
    kind = read.dtype(read.uncast(norm.x))
    if kind is None or kind == read.dtype(node):
        return None
    if any(read.uncast(user) is user or read.dtype(user) != kind for user in node.users):
        return None
    for use in (norm.weight, norm.bias):
        weight = program.weight(use)
        if weight is None:
            continue
        if weight.steps or weight.source is None or program.sources[weight.source].dtype != kind:
            return None
    return kind


_ROOTS = frozenset({aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar})

RAISINGS.add(Raising("norm", _ROOTS, _raise_norm))
RAISINGS.add(Raising("norm_affine", frozenset(_NORMS), _absorb, after=("norm",)))
