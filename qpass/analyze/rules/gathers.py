"""Gathering and scattering by an index for each entry: rows move whole where it is repeated."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.atoms import Axis, fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.ir import read

aten = torch.ops.aten

_LOOKED_UP = "is looked up by index"

_REPEATS = (aten.expand.default, aten.expand_as.default, aten.repeat.default)
_COPIES = (aten.contiguous.default, aten.clone.default, aten.to.dtype)


@rule(aten.gather.default)
def _gather(node: fx.Node, c: Constraints) -> None:
    source, index = read.value(node, "self"), read.value(node, "index")
    moved = _moved_whole(node, index, source)
    out: list[Axis] = []
    for i, axis in enumerate(c.layout(source)):
        if i in moved:
            out.append(axis)
            continue
        made = fresh(size_of(read.shape(node)[i]))
        c.pin(axis, _LOOKED_UP)
        c.pin(made, _LOOKED_UP)
        out.append(made)
    c.give(node, out)


@rule(aten.scatter_add.default, aten.scatter.src)
def _scatter(node: fx.Node, c: Constraints) -> None:
    into, index, put = (read.value(node, name) for name in ("self", "index", "src"))
    moved = _moved_whole(node, index, into) & _moved_whole(node, index, put)
    for i, (axis, own) in enumerate(zip(c.layout(into), c.layout(put), strict=True)):
        if i in moved:
            c.tie(axis, own)
        else:
            c.pin(axis, _LOOKED_UP)
            c.pin(own, _LOOKED_UP)
    c.give(node, c.layout(into))


def _moved_whole(node: fx.Node, index: fx.Node, value: fx.Node) -> set[int]:
    """The axes along which the index says the same for every entry of `value`."""
    shape = read.shape(value)
    if len(read.shape(index)) != len(shape) or not shape:
        return set()
    dim = read.integer(node, "dim") % len(shape)
    return {
        i for i in _repeated(index) if i != dim and read.same_size(read.shape(index)[i], shape[i])
    }


def _repeated(index: fx.Node) -> set[int]:
    """The axes along which a value repeats one entry."""
    rank, found = len(read.shape(index)), set[int]()
    while read.calls(index, *_REPEATS, *_COPIES):
        source = read.value(index, "self")
        if read.calls(index, *_REPEATS):
            ahead = rank - len(read.shape(source))
            sizes = (1,) * ahead + tuple(read.shape(source))
            found |= {i for i, size in enumerate(sizes) if read.same_size(size, 1)}
            if ahead:
                break
        index = source
    return found
