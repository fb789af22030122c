"""Convolutions: a linear map of channels at every place, so channels change as a linear's do."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.atoms import fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.analyze.rules.broadcast import merge
from qpass.ir import read

aten = torch.ops.aten


@rule(
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
def _convolve(node: fx.Node, c: Constraints) -> None:
    x, weight = read.value(node, "input"), read.value(node, "weight")
    if read.integer(node, "groups") != 1 or _transposed(node):
        for touched in node.all_input_nodes:
            c.pin_all(touched, "convolves channels in groups")
        c.give_fresh(node)
        c.pin_all(node, "convolves channels in groups")
        return
    # o and i channels, the rest are places; the batch is absent in x of one axis less
    values, kernel_oi = c.layout(x), c.layout(weight)
    places = len(kernel_oi) - 2
    channel = len(values) - places - 1
    c.contract(values, channel, kernel_oi, 1)
    c.absorb(weight, 1)
    made = tuple(fresh(size_of(size)) for size in read.shape(node)[channel + 1 :])
    for layout, start in ((values, channel + 1), (kernel_oi, 2), (made, 0)):
        for axis in range(start, len(layout)):
            c.pin(layout[axis], "is convolved over")
            c.mix(layout, axis)
    out = (*values[:channel], kernel_oi[0], *made)
    if (bias := read.optional_value(node, "bias")) is not None:
        channels = (c.layout(bias)[0], *((),) * places)
        out = merge(c, out, channels, constant="one value is added to every entry")
    c.give(node, out)


def _transposed(node: fx.Node) -> bool:
    return node.target is aten.convolution.default and read.argument(node, "transposed") is True
