"""Gathering, scattering and repeating: whole rows move, to places that depend on data or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import fx

from qpass.analyze.atoms import Axis, fresh, size_of
from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.rules.base import rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten

_LOOKED_UP = "is looked up by index"


@rule(aten.index.Tensor)
def _index(node: fx.Node, c: Constraints) -> None:
    found = _looked_up(node, c)
    shape = [size_of(size) for size in read.shape(node)]
    made = tuple(fresh(size) for size in shape[found.begin : found.begin + found.count])
    for axis in made:
        c.pin(axis, _LOOKED_UP)
    c.give(node, (*found.kept[: found.begin], *made, *found.kept[found.begin :]))


@rule(aten.index_put.default)
def _put(node: fx.Node, c: Constraints) -> None:
    """Rows are replaced by, or added to, the rows of `values`."""
    found, values = _looked_up(node, c), c.layout(read.value(node, "values"))
    rank = len(found.kept) + found.count
    values = ((),) * (rank - len(values)) + values
    for axis in values[found.begin : found.begin + found.count]:
        c.pin(axis, _LOOKED_UP)
    rows = (*values[: found.begin], *values[found.begin + found.count :])
    merge(c, found.kept, rows, constant="one value is written to every entry")
    c.give(node, c.layout(read.value(node, "self")))


@final
@dataclass(frozen=True, slots=True)
class _LookedUp:
    """The axes that indices leave alone, and where among them how many axes of indices stand."""

    kept: Layout
    begin: int
    count: int


def _looked_up(node: fx.Node, c: Constraints) -> _LookedUp:
    layout = c.layout(read.value(node, "self"))
    taken: list[int] = []
    dim, count = 0, 0
    for index in read.optional_values(node, "indices"):
        if index is None:
            dim += 1
            continue
        # a mask takes as many axes as it has, and its entries become one
        masks = read.dtype(index) == torch.bool
        width = len(read.shape(index)) if masks else 1
        taken += range(dim, dim + width)
        dim, count = dim + width, max(count, 1 if masks else len(read.shape(index)))
    for axis in taken:
        c.pin(layout[axis], _LOOKED_UP)
    kept = tuple(axis for i, axis in enumerate(layout) if i not in taken)
    # indices that stand side by side are replaced where they stand, others in front
    together = taken == list(range(taken[0], taken[-1] + 1))
    return _LookedUp(kept, taken[0] if together else 0, count)


@rule(aten.index_select.default)
def _select(node: fx.Node, c: Constraints) -> None:
    layout = list(c.layout(read.value(node, "self")))
    dim = read.integer(node, "dim") % len(layout)
    c.pin(layout[dim], _LOOKED_UP)
    layout[dim] = fresh(size_of(read.shape(node)[dim]))
    c.pin(layout[dim], _LOOKED_UP)
    c.give(node, layout)


@rule(aten.index_add.default)
def _add_rows(node: fx.Node, c: Constraints) -> None:
    into, added = c.layout(read.value(node, "self")), c.layout(read.value(node, "source"))
    dim = read.integer(node, "dim") % len(into)
    for axis, (own, other) in enumerate(zip(into, added, strict=True)):
        if axis == dim:
            c.pin(own, _LOOKED_UP)
            c.pin(other, _LOOKED_UP)
        else:
            c.tie(own, other)
    c.give(node, into)


@rule(aten.repeat_interleave.self_int)
def _repeat_each(node: fx.Node, c: Constraints) -> None:
    layout = list(c.layout(read.value(node, "self")))
    n, dim = read.argument(node, "repeats"), read.argument(node, "dim")
    if not isinstance(n, int) or not isinstance(dim, int) or not layout:
        _lost(node, c, "is repeated over all axes, or a number of times only known at run time")
        return
    repeat = fresh(n)
    c.limit(repeat, "repeats one entry", Group.ORTHOGONAL_ONES)
    layout[dim % len(layout)] = (*layout[dim % len(layout)], *repeat)
    c.give(node, layout)


@rule(aten.repeat.default)
def _repeat(node: fx.Node, c: Constraints) -> None:
    layout = c.layout(read.value(node, "self"))
    times = read.sizes(node, "repeats")
    if not all(isinstance(n, int) for n in times):
        _lost(node, c, "is repeated a number of times only known at run time")
        return
    axes: list[Axis] = []
    for n, axis in zip(times, ((),) * (len(times) - len(layout)) + layout, strict=True):
        repeat = fresh(cast("int", n))
        c.limit(repeat, "repeats one entry", Group.ORTHOGONAL_ONES)
        axes.append((*repeat, *axis))
    c.give(node, axes)


@rule(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def _grouped_product(node: fx.Node, c: Constraints) -> None:
    """Rows, sorted by group, times the matrix of their group."""
    operands = [n for n in node.all_input_nodes if read.is_floating(n)]
    layouts = [c.layout(n) for n in operands]
    if [len(layout) for layout in layouts] != [2, 3]:
        _lost(node, c, "is a product in groups of another kind")
        return
    rows, matrices = layouts
    c.contract(rows, 1, matrices, 1)
    c.absorb(operands[1], 1)
    for axis in (rows[0], matrices[0]):
        c.pin(axis, "is a product in groups")
    c.give(node, (rows[0], matrices[2]))


def _lost(node: fx.Node, c: Constraints, why: str) -> None:
    for touched in node.all_input_nodes:
        if touched in c.layouts:
            c.pin_all(touched, why)
    c.give_fresh(node)
    c.pin_all(node, why)
