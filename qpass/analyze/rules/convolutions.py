"""Convolutions: a linear map of channels at every place, so channels change as a linear's do."""

from __future__ import annotations

from torch import fx

from qpass.analyze.atoms import Axis, fresh, size_of
from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.convolutions import CONVOLUTIONS, is_transposed
from qpass.analyze.rules.base import rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import read

_GROUPS = "convolves channels in groups"


@rule(*CONVOLUTIONS)
def _convolve(node: fx.Node, c: Constraints) -> None:
    x, weight = read.value(node, "input"), read.value(node, "weight")
    transposed = is_transposed(node)
    # o and i channels, the rest are places; the batch is absent in x of one axis less
    values, kernel = c.layout(x), c.layout(weight)
    places = len(kernel) - 2
    channel = len(values) - places - 1
    c.absorb(weight, 0 if transposed else 1)
    groups = read.integer(node, "groups")
    if groups == 1:
        read_axis, made_axis = (0, 1) if transposed else (1, 0)
        c.contract(values, channel, kernel, read_axis)
        channels = kernel[made_axis]
    else:
        channels = _grouped(node, c, groups, channel)
    made = tuple(fresh(size_of(size)) for size in read.shape(node)[channel + 1 :])
    for layout, start in ((values, channel + 1), (kernel, 2), (made, 0)):
        for axis in range(start, len(layout)):
            c.pin(layout[axis], "is convolved over")
            c.mix(layout, axis)
    out = (*values[:channel], channels, *made)
    if (bias := read.optional_value(node, "bias")) is not None:
        added = (c.layout(bias)[0], *((),) * places)
        out = merge(c, out, added, constant="one value is added to every entry")
    c.give(node, out)


def _grouped(node: fx.Node, c: Constraints, groups: int, channel: int) -> Axis:
    """The channels of the result: those of each group are mixed, and groups stay where they are.

    Where one axis of the weight serves all groups, all of them change alike.
    """
    x, weight = read.value(node, "input"), read.value(node, "weight")
    kernel = c.layout(weight)
    split = _split(c, x, channel, groups)
    own = _split(c, weight, 0, groups)
    for axis in (split[channel], own[0]):
        c.pin(axis, _GROUPS)
    if is_transposed(node):
        c.contract(split, channel + 1, own, 1)
        return (*own[0], *kernel[1])
    c.contract(split, channel + 1, kernel, 1)
    return (*own[0], *own[1])


def _split(c: Constraints, node: fx.Node, dim: int, groups: int) -> Layout:
    """The axes of a value, with one of them as groups of entries."""
    layout, length = c.layout(node), size_of(read.shape(node)[dim])
    parts = c.view(layout[dim : dim + 1], (groups, length // groups))
    return (*layout[:dim], *parts, *layout[dim + 1 :])
