"""Which half of a value's last axis another value is, and where two halves are joined."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import fx

from qpass.ir import read

aten = torch.ops.aten

_VIEWS = (aten.reshape.default, aten.unflatten.int)


@final
@dataclass(frozen=True, slots=True)
class Half:
    """Half of the last axis of `x`: the even or odd entries if interleaved, else a block."""

    x: fx.Node
    second: bool
    interleaved: bool

    def other(self) -> Half:
        """The rest of the axis."""
        return replace(self, second=not self.second)


@final
@dataclass(frozen=True, slots=True)
class Joined:
    """A value `whole` whose last axis is made of two values, in turns if interleaved."""

    whole: fx.Node
    first: fx.Node
    second: fx.Node
    interleaved: bool


def half_of(node: fx.Node) -> Half | None:
    """The value and the half of it that `node` is, or None."""
    node = read.uncast(node)
    if read.calls(node, aten.slice.Tensor):
        return _slice(node)
    if read.calls(node, aten.select.int):
        taken, axis = read.value(node, "self"), read.integer(node, "dim")
        return _of_pairs(taken, read.flat_axis(taken, axis), read.argument(node, "index"))
    if node.target is not operator.getitem:
        return None
    many, index = read.plain_arguments(node)
    if not isinstance(many, fx.Node):
        return None
    if read.calls(many, aten.unbind.int):
        taken = read.value(many, "self")
        return _of_pairs(taken, read.flat_axis(taken, read.integer(many, "dim")), index)
    if read.calls(many, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default):
        return _piece(node, read.value(many, "self"), read.integer(many, "dim"), index)
    return None


def joined_halves(node: fx.Node) -> Joined | None:
    """The two halves of equal length that a `cat` or `stack` joins on the last axis, or None."""
    parts = read.values(node, "tensors")
    axes = len(read.shape(node))
    dim = read.integer(node, "dim") % axes
    if len(parts) != 2 or not read.same_shape(*parts):
        return None
    if read.calls(node, aten.cat.default):
        return Joined(node, *parts, interleaved=False) if dim == axes - 1 else None
    if dim < axes - 2 or len(node.users) != 1:
        return None
    (whole,) = node.users
    last = read.shape(parts[0])[-1]
    merged = isinstance(last, int) and read.has_shape(whole, (*read.shape(parts[0])[:-1], 2 * last))
    if not merged or not read.calls(whole, aten.reshape.default, aten.flatten.using_ints):
        return None
    return Joined(whole, *parts, interleaved=dim == axes - 1)


def is_view_of_pairs(node: fx.Node) -> bool:
    """Whether `node` is a view of a value whose last axis is split into pairs."""
    if not read.calls(node, *_VIEWS):
        return False
    shape, source = read.shape(node), read.value(node, "self")
    if shape[-1] != 2 or not isinstance(shape[-2], int):
        return False
    return read.has_shape(source, (*shape[:-2], 2 * shape[-2]))


def _slice(node: fx.Node) -> Half | None:
    x = read.value(node, "self")
    last = len(read.shape(x)) - 1
    width, step = read.shape(x)[last], read.argument(node, "step")
    start, end = read.argument(node, "start") or 0, read.argument(node, "end")
    if read.flat_axis(x, read.integer(node, "dim")) != last or not isinstance(width, int):
        return None
    if not isinstance(start, int) or not isinstance(end, int | None) or width % 2:
        return None
    stop = width if end is None else min(end if end >= 0 else end + width, width)
    start = start if start >= 0 else start + width
    half = width // 2
    known = {
        (0, half, 1): (False, False),
        (half, width, 1): (True, False),
        (0, width, 2): (False, True),
        (0, width - 1, 2): (False, True),
        (1, width, 2): (True, True),
    }
    found = known.get((start, stop, step if isinstance(step, int) else 0))
    return None if found is None else Half(read.uncast(x), *found)


def _piece(node: fx.Node, x: fx.Node, dim: int, index: object) -> Half | None:
    last, width = len(read.shape(x)) - 1, read.shape(node)[-1]
    if read.flat_axis(x, dim) != last or not isinstance(width, int):
        return None
    whole = read.same_size(read.shape(x)[last], 2 * width)
    if not whole or index not in (0, 1):
        return None
    return Half(read.uncast(x), second=index == 1, interleaved=False)


def _of_pairs(taken: fx.Node, axis: int, index: object) -> Half | None:
    """Entry `index` of an axis of length 2 that a view split off the last axis."""
    taken = read.uncast(taken)
    axes = len(read.shape(taken))
    if not read.calls(taken, *_VIEWS) or axis < axes - 2 or index not in (0, 1, -1, -2):
        return None
    shape, source = read.shape(taken), read.value(taken, "self")
    other = shape[-2] if axis == axes - 1 else shape[-1]
    if shape[axis] != 2 or not isinstance(other, int):
        return None
    if not read.has_shape(source, (*shape[:-2], 2 * other)):
        return None
    return Half(read.uncast(source), second=index in (1, -1), interleaved=axis == axes - 1)
