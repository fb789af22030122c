"""Reshaping, reordering, slicing and joining: entries move, values do not change."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx

from qpass.analyze.atoms import Axis, Size, fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten

_END = 2**62  # larger stops mean "to the end"

RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
PERMUTES = (
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.mT.default,
    aten.numpy_T.default,
)
_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
COPIES = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)

# operators whose result holds entries of their first argument and nothing else
MOVES = frozenset(
    {
        *RESHAPES,
        *PERMUTES,
        *_SPLITS,
        *COPIES,
        aten.expand.default,
        aten.expand_as.default,
        aten.slice.Tensor,
        aten.select.int,
        operator.getitem,
    }
)


@rule(*RESHAPES)
def _view(node: fx.Node, c: Constraints) -> None:
    c.give(node, c.view(c.layout(read.value(node, "self")), _shape(node)))


@rule(*PERMUTES)
def _permute(node: fx.Node, c: Constraints) -> None:
    layout = list(c.layout(read.value(node, "self")))
    rank = len(layout)
    if node.target is aten.permute.default:
        order = [int(cast("int", d)) % rank for d in read.sizes(node, "dims")]
    elif node.target is aten.transpose.int and rank:
        order = list(range(rank))
        a, b = read.integer(node, "dim0") % rank, read.integer(node, "dim1") % rank
        order[a], order[b] = order[b], order[a]
    elif node.target is aten.mT.default:
        order = [*range(rank - 2), rank - 1, rank - 2]
    else:
        order = list(reversed(range(rank)))
    c.give(node, [layout[d] for d in order])


@rule(aten.expand.default, aten.expand_as.default)
def _expand(node: fx.Node, c: Constraints) -> None:
    source = c.layout(read.value(node, "self"))
    old = (1,) * (len(_shape(node)) - len(source)) + read.shape(read.value(node, "self"))
    source = ((),) * (len(old) - len(source)) + source
    axes: list[Axis] = []
    for axis, before, after in zip(source, old, _shape(node), strict=True):
        axes.append(axis if size_of(before) == after else _repeated(after, c))
    c.give(node, axes)


@rule(aten.slice.Tensor)
def _slice(node: fx.Node, c: Constraints) -> None:
    source = read.value(node, "self")
    layout = list(c.layout(source))
    dim = read.integer(node, "dim") % len(layout)
    size = size_of(read.shape(source)[dim])
    bounds = read.argument(node, "start"), read.argument(node, "end"), read.argument(node, "step")
    start = 0 if bounds[0] is None else bounds[0]
    end = _END if bounds[1] is None else bounds[1]
    if start == 0 and bounds[2] == 1 and (size == _shape(node)[dim]):
        c.give(node, layout)
        return
    sliced = None
    if all(isinstance(n, int) for n in (size, start, end, bounds[2])):
        taken = range(*slice(start, end, bounds[2]).indices(cast("int", size)))
        sliced = _sliced(layout[dim], cast("int", size), taken, c)
    layout[dim] = _lost(node, dim, layout[dim], c) if sliced is None else sliced
    c.give(node, layout)


def _sliced(axis: Axis, size: int, taken: range, c: Constraints) -> Axis | None:
    """Entries of an axis in a row, or every so many of it; None where neither."""
    if taken.step == 1 or len(taken) <= 1:
        return c.slice(axis, taken.start, taken.start + len(taken))
    if size % taken.step or len(taken) != size // taken.step:
        return None
    outer, inner = c.view((axis,), (size // taken.step, taken.step))
    c.slice(inner, taken.start, taken.start + 1)
    return outer


@rule(aten.select.int)
def _select(node: fx.Node, c: Constraints) -> None:
    source = read.value(node, "self")
    layout = list(c.layout(source))
    dim = read.integer(node, "dim") % len(layout)
    size = size_of(read.shape(source)[dim])
    index = read.argument(node, "index")
    if isinstance(size, int) and isinstance(index, int):
        c.slice(layout[dim], index % size, index % size + 1)
    else:
        c.pin(layout[dim], "one entry is selected")
    c.give(node, layout[:dim] + layout[dim + 1 :])


@rule(*_SPLITS)
def _split(node: fx.Node, c: Constraints) -> None:
    """The pieces are made where they are taken out of the tuple."""


@rule(operator.getitem)
def _take(node: fx.Node, c: Constraints) -> None:
    source, index = cast("tuple[fx.Node, int]", node.args)
    if not read.calls(source, *_SPLITS):
        if read.fake(node) is not None:
            c.give_fresh(node)
            c.pin_all(node, f"{read.target_name(source)} has no rule")
        return
    whole = read.value(source, "self")
    layout = list(c.layout(whole))
    dim = read.integer(source, "dim") % len(layout)
    unbound = source.target is aten.unbind.int
    pieces = cast("tuple[Tensor, ...]", source.meta["val"])
    sizes = [1 if unbound else size_of(p.shape[dim]) for p in pieces]
    if all(isinstance(s, int) for s in (*sizes, size_of(read.shape(whole)[dim]))):
        start = sum(cast("list[int]", sizes[:index]))
        layout[dim] = c.slice(layout[dim], start, start + cast("int", sizes[index]))
    else:
        layout[dim] = _lost(node, dim, layout[dim], c) if not unbound else ()
    c.give(node, layout[:dim] + layout[dim + 1 :] if unbound else layout)


@rule(aten.cat.default, aten.stack.default)
def _cat(node: fx.Node, c: Constraints) -> None:
    shape = _shape(node)
    # a vector without entries may be joined to anything
    parts = [n for n in read.values(node, "tensors") if read.static_shape(n) != (0,)]
    if not parts:
        c.give_fresh(node)
        return
    dim = read.integer(node, "dim") % len(shape)
    layouts = [list(c.layout(part)) for part in parts]
    if node.target is aten.stack.default:
        for layout in layouts:
            layout.insert(dim, ())
    merged = layouts[0]
    for layout in layouts[1:]:
        for d in range(len(shape)):
            if d != dim:
                c.tie(merged[d], layout[d])
    joined = c.concatenate([layout[dim] for layout in layouts], shape[dim])
    c.give(node, [joined if d == dim else merged[d] for d in range(len(shape))])


@rule(*COPIES)
def _copy(node: fx.Node, c: Constraints) -> None:
    source = next(iter(node.all_input_nodes))
    if read.is_floating(source) and read.is_floating(node):
        c.give(node, c.layout(source))
        return
    c.pin_all(source, "is converted to or from integers")
    c.give_fresh(node)
    c.pin_all(node, "is converted to or from integers")


@rule(aten.dropout.default)
def _dropout(node: fx.Node, c: Constraints) -> None:
    source = read.value(node, "input")
    c.give(node, c.layout(source))
    if read.argument(node, "train"):
        c.pin_all(source, "drops entries at random")


def _shape(node: fx.Node) -> tuple[Size, ...]:
    return tuple(size_of(s) for s in read.shape(node))


def _repeated(size: Size, c: Constraints) -> Axis:
    axis = fresh(size)
    c.limit(axis, "repeats one entry", Group.ORTHOGONAL_ONES)
    return axis


def _lost(node: fx.Node, dim: int, axis: Axis, c: Constraints) -> Axis:
    why = "is sliced at places only known at run time, or in steps"
    c.pin(axis, why)
    out = fresh(_shape(node)[dim])
    c.pin(out, why)
    return out
