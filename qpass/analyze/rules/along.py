"""Linear maps along given axes that treat all other axes alike: reversing, padding, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from qpass.analyze.atoms import Axis, fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten


@rule(aten.flip.default, aten.roll.default)
def _moved(node: fx.Node, c: Constraints) -> None:
    dims = [int(cast("int", d)) for d in read.sizes(node, "dims")]
    _along(node, c, dims or range(len(read.shape(node))), "is turned round or shifted")


@rule(aten.cumsum.default)
def _summed(node: fx.Node, c: Constraints) -> None:
    _along(node, c, [read.integer(node, "dim")], "is summed up to each entry")


@rule(
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
def _padded(node: fx.Node, c: Constraints) -> None:
    ends = read.sizes(node, "pad" if read.has(node, "pad") else "padding")
    rank = len(read.shape(node))
    pairs = [ends[i : i + 2] for i in range(0, len(ends), 2)]
    dims = [rank - 1 - i for i, pair in enumerate(pairs) if list(pair) != [0, 0]]
    value = read.argument(node, "value") if read.has(node, "value") else None
    if value and dims:
        for axis in c.layout(read.value(node, "self")):
            c.limit(axis, "a constant is joined to it", Group.ORTHOGONAL_ONES)
    _along(node, c, dims, "is padded")


@rule(
    aten.avg_pool1d.default,
    aten.adaptive_avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.vec,
)
def _pooled(node: fx.Node, c: Constraints) -> None:
    x = read.value(node, "input" if read.has(node, "input") else "self")
    places = 1 if "1d" in read.target_name(node) else 2
    rank = len(read.shape(x))
    _along(node, c, range(rank - places, rank), "is averaged over places")


@rule(aten.unfold.default)
def _windows(node: fx.Node, c: Constraints) -> None:
    """Windows along one axis, whose places become a new last axis."""
    source = read.value(node, "self")
    layout = list(c.layout(source))
    dim = read.integer(node, "dimension") % len(layout)
    c.pin(layout[dim], "is cut into windows")
    c.mix(tuple(layout), dim)
    layout[dim] = fresh(size_of(read.shape(node)[dim]))
    layout.append(fresh(size_of(read.shape(node)[-1])))
    for axis in (layout[dim], layout[-1]):
        c.pin(axis, "is cut into windows")
    c.give(node, layout)


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def _replaced(node: fx.Node, c: Constraints) -> None:
    into, put = c.layout(read.value(node, "self")), c.layout(read.value(node, "src"))
    dim = read.integer(node, "dim") % len(into)
    rest = into[:dim] + into[dim + 1 :]
    if read.calls(node, aten.slice_scatter.default):
        c.pin(put[dim], "replaces entries of another value")
        put = put[:dim] + put[dim + 1 :]
    c.pin(into[dim], "some of its entries are replaced")
    merge(c, rest, put, constant="one value is written to every entry")
    c.give(node, into)


@rule(aten.copy.default)
def _copied(node: fx.Node, c: Constraints) -> None:
    """The values of `src`, repeated to the shape of `self`."""
    source = read.value(node, "src")
    if not (read.is_floating(node) and read.is_floating(source)):
        c.pin_all(source, "is converted to or from integers")
        c.give_fresh(node)
        c.pin_all(node, "is converted to or from integers")
        return
    shape = [size_of(size) for size in read.shape(node)]
    old = [size_of(size) for size in read.shape(source)]
    layout = ((),) * (len(shape) - len(old)) + c.layout(source)
    old = [1] * (len(shape) - len(old)) + old
    axes: list[Axis] = []
    for axis, before, after in zip(layout, old, shape, strict=True):
        repeats = axis if before == after else fresh(after)
        if before != after:
            c.limit(repeats, "repeats one entry", Group.ORTHOGONAL_ONES)
        axes.append(repeats)
    c.give(node, axes)


def _along(node: fx.Node, c: Constraints, dims: Sequence[int], why: str) -> None:
    """The result is linear in its source along `dims`, whose axes keep their basis."""
    source = next(iter(node.all_input_nodes))
    layout = list(c.layout(source))
    if not read.is_floating(source) or not read.is_floating(node):
        c.pin_all(source, "is converted to or from integers")
        c.give_fresh(node)
        c.pin_all(node, "is converted to or from integers")
        return
    for dim in dims:
        c.pin(layout[dim], why)
        c.mix(tuple(layout), dim)
        layout[dim] = fresh(size_of(read.shape(node)[dim]))
        c.pin(layout[dim], why)
    c.give(node, layout)
