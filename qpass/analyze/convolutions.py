"""Which convolutions meet which weights, and along which axes their channels lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.ir import Block, Program, read

aten = torch.ops.aten

FORWARD = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
CONVOLUTIONS = (*FORWARD, *TRANSPOSED, aten.convolution.default)

# what widens images at their ends, alike in all channels, and so commutes with a change of these
_PADS = (
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)


@final
@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of a value with one use of a weight.

    Its channels come in `groups` of `width`, along the axis `channel` of `value`, counted from the
    last, and of each group along the axis `reads` of the weight. `reader` is what reads `value`:
    the convolution `node`, or what its module pads in front of it.
    """

    node: str
    value: str
    reader: str
    use: str
    reads: int
    channel: int
    groups: int
    width: int

    @property
    def block(self) -> Block:
        """The channels of each group on the weight's axis."""
        if self.reads == 1 or self.groups == 1:
            return Block.whole(self.width)
        return Block(0, (self.groups, self.width), (self.width, 1))


def find_convolutions(program: Program) -> tuple[Convolution, ...]:
    """Every convolution of a value with a weight, in graph order."""
    found = (_convolution(program, node) for node in program.graph.nodes)
    return tuple(one for one in found if one is not None)


def is_transposed(node: fx.Node) -> bool:
    """Whether a convolution is one backwards: its weight begins with the channels that it reads."""
    if read.calls(node, aten.convolution.default):
        return read.argument(node, "transposed") is True
    return read.calls(node, *TRANSPOSED)


def channels_turned(program: Program, convolution: Convolution) -> fx.Node | None:
    """The transform that made the channels of a convolution, if that is what it reads."""
    node = program.node(convolution.value)
    rank = len(read.shape(node))
    axis = rank + convolution.channel
    if not _swaps(node, axis, rank):
        return None
    node = read.value(node, "self")
    if convolution.groups > 1:
        if not read.calls(node, aten.flatten.using_ints):
            return None
        node = read.value(node, "self")
    if not read.calls(node, torch.ops.qpass.hadamard.default):
        return None
    return node if read.shape(node)[-1] == convolution.width else None


def _swaps(node: fx.Node, axis: int, rank: int) -> bool:
    """Whether a node exchanges an axis with the last."""
    if not read.calls(node, aten.transpose.int):
        return False
    dims = {read.integer(node, name) % rank for name in ("dim0", "dim1")}
    return dims == {axis, rank - 1}


def _convolution(program: Program, node: fx.Node) -> Convolution | None:
    if not read.calls(node, *CONVOLUTIONS):
        return None
    x, weight = read.value(node, "input"), read.value(node, "weight")
    if program.weight(weight) is None or program.weight(x) is not None:
        return None
    kernel = read.static_shape(weight)
    if kernel is None:
        return None
    groups = read.integer(node, "groups")
    transposed = is_transposed(node)
    width = kernel[0] // groups if transposed else kernel[1]
    reads, places = 0 if transposed else 1, len(kernel) - 2
    value, reader = _unpadded(program, x, node, places)
    return Convolution(
        node.name, value.name, reader.name, weight.name, reads, -places - 1, groups, width
    )


def _unpadded(
    program: Program, value: fx.Node, reader: fx.Node, places: int
) -> tuple[fx.Node, fx.Node]:
    """The value before a module's own padding of its places, and what reads it."""
    path = read.module_path(reader)
    while read.calls(value, *_PADS) and read.module_path(value) == path and len(value.users) == 1:
        ends = read.sizes(value, "pad" if read.has(value, "pad") else "padding")
        constant = read.argument(value, "value") if read.has(value, "value") else None
        source = read.value(value, "self")
        if constant or len(ends) > 2 * places or program.weight(source) is not None:
            break
        value, reader = source, value
    return value, reader
