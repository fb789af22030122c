"""Which values are cut out of one axis after a view had split it: they are slices of that axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Program, edit, read

aten = torch.ops.aten


def _raise_known_index(program: Program, node: fx.Node) -> Note | None:
    """Replace `x[:, [2, 3]]`, whose indices the code knows and which are neighbours, by a slice."""
    indices = read.optional_values(node, "indices")
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    ((dim, index),) = given
    x, weight = read.value(node, "self"), program.weight(index)
    size = read.shape(x)[dim]
    if weight is None or index.name in program.owners or not isinstance(size, int):
        return None
    numbers = weight.evaluate(program.sources)
    if numbers.dim() != 1 or numbers.dtype == torch.bool or not numbers.numel():
        return None
    start = int(numbers[0]) % size
    if [int(n) % size for n in numbers] != list(range(start, start + len(numbers))):
        return None
    where = read.module_path(node)
    edit.replace(
        node,
        edit.respell(program, node, aten.slice.Tensor, x, dim, start, start + len(numbers)),
    )
    return Note(done=True, where=where, why="raised to aten.slice")


def _raise_cuts(program: Program, view: fx.Node) -> Note | None:
    """Cut before the view instead of behind it, where each reader cuts one of the axes it made.

    Parts of one axis, as `q`, `k` and `v` in `x.view(b, t, 3, heads, width)`, can then change
    basis apart; as one factor of a product they cannot.
    """
    split = _Split.of(view)
    if split is None:
        return None
    cuts = [_cut(reader, split) for reader in view.users]
    known = [cut for cut in cuts if cut is not None]
    if not known or len(known) < len(cuts) or len({cut.axis for cut in known}) > 1:
        return None
    where = read.module_path(view)
    for cut in known:
        for node, start, stop in cut.pieces:
            edit.replace(node, _before_view(program, node, split, cut, start, stop))
    return Note(done=True, where=where, why="an axis is cut before it is split")


@final
@dataclass(frozen=True, slots=True)
class _Split:
    """A view that splits the last axis of `source` into its own axes from `first` on."""

    view: fx.Node
    source: fx.Node
    first: int
    sizes: tuple[int, ...]

    @staticmethod
    def of(view: fx.Node) -> _Split | None:
        source = read.value(view, "self")
        whole, shape = read.shape(source)[-1:], read.shape(view)
        if not whole or not isinstance(whole[0], int):
            return None
        first, total = len(shape), 1
        while first > 0 and isinstance(size := shape[first - 1], int) and total < whole[0]:
            total *= size
            first -= 1
        sizes = tuple(size for size in shape[first:] if isinstance(size, int))
        if total != whole[0] or len(sizes) < 2:
            return None
        return _Split(view, source, first, sizes)


@final
@dataclass(frozen=True, slots=True)
class _Cut:
    """Nodes that are entries `start` to `stop` of one axis of a view, perhaps permuted before.

    `dropped` says that the axis, of which they are one entry, is gone.
    """

    axis: int
    order: tuple[int, ...]
    dropped: bool
    pieces: tuple[tuple[fx.Node, int, int], ...]


def _cut(reader: fx.Node, split: _Split) -> _Cut | None:
    """What a reader of the view cuts, or None where it does something else."""
    rank = len(read.shape(split.view))
    order = tuple(range(rank))
    if read.calls(reader, aten.permute.default, aten.transpose.int) and len(reader.users) == 1:
        order = _order(reader, rank)
        (reader,) = reader.users
    if read.calls(reader, aten.select.int):
        index = read.argument(reader, "index")
        return _along(reader, order, split, index if isinstance(index, int) else None)
    if read.calls(reader, aten.slice.Tensor) and read.argument(reader, "step") == 1:
        return _range(reader, order, split)
    if read.calls(reader, aten.unbind.int):
        axis = order[read.integer(reader, "dim") % rank]
        if not split.first <= axis < rank - 1:
            return None
        taken = [(user, read.plain_arguments(user)[1]) for user in reader.users]
        pieces = tuple((user, i, i + 1) for user, i in taken if isinstance(i, int))
        return _Cut(axis, order, True, pieces) if len(pieces) == len(taken) else None
    return None


def _along(node: fx.Node, order: tuple[int, ...], split: _Split, index: int | None) -> _Cut | None:
    axis = order[read.integer(node, "dim") % len(order)]
    if index is None or not split.first <= axis < len(order) - 1:
        return None
    start = index % split.sizes[axis - split.first]
    return _Cut(axis, order, True, ((node, start, start + 1),))


def _range(node: fx.Node, order: tuple[int, ...], split: _Split) -> _Cut | None:
    axis = order[read.integer(node, "dim") % len(order)]
    start, end = read.argument(node, "start") or 0, read.argument(node, "end")
    if not split.first <= axis < len(order) - 1:
        return None
    if not isinstance(start, int) or not isinstance(end, int | None):
        return None
    low, high, _ = slice(start, end).indices(split.sizes[axis - split.first])
    return _Cut(axis, order, False, ((node, low, high),)) if low < high else None


def _order(node: fx.Node, rank: int) -> tuple[int, ...]:
    if read.calls(node, aten.permute.default):
        return tuple(int(str(d)) % rank for d in read.sizes(node, "dims"))
    order = list(range(rank))
    a, b = (read.integer(node, name) % rank for name in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _before_view(
    program: Program, node: fx.Node, split: _Split, cut: _Cut, start: int, stop: int
) -> fx.Node:
    """`node`, written as a slice of the source, a view and a permutation."""
    # as the graph writes them: numbers, or values where they are symbolic
    shape = read.sizes(split.view, "shape")[: cut.axis]
    inner = split.sizes[cut.axis - split.first + 1 :]
    width = math.prod(inner)
    whole = [*shape, split.sizes[cut.axis - split.first] * width]
    value = split.source
    if cut.axis > split.first:
        value = edit.call(program, node, aten.reshape.default, value, whole)
    if stop - start < split.sizes[cut.axis - split.first]:
        last = len(read.shape(value)) - 1
        ends = (start * width, stop * width)
        value = edit.call(program, node, aten.slice.Tensor, value, last, *ends)
    kept = [] if cut.dropped else [stop - start]
    if [*kept, *inner] != [(stop - start) * width]:
        value = edit.call(program, node, aten.reshape.default, value, [*shape, *kept, *inner])
    order = [axis for axis in cut.order if not cut.dropped or axis != cut.axis]
    order = [axis - (cut.dropped and axis > cut.axis) for axis in order]
    if order != sorted(order):
        value = edit.call(program, node, aten.permute.default, value, order)
    return value


RAISINGS.add(Raising("known_index", frozenset({aten.index.Tensor}), _raise_known_index))
RAISINGS.add(
    Raising(
        "cuts",
        frozenset({aten.reshape.default}),
        _raise_cuts,
        after=("known_index", "rotary", "attention", "repeat_heads", "grouped_attention"),
    )
)
