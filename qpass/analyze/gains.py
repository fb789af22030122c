"""Which products multiply each entry of a last axis by a weight of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.ir import Program, read

aten = torch.ops.aten


@final
@dataclass(frozen=True, slots=True)
class Gain:
    """`value * gain`, where the gain is a use of a weight as long as the last axis."""

    value: fx.Node
    gain: fx.Node


def find_gain(program: Program, node: fx.Node) -> Gain | None:
    """The gain by which `node` multiplies, or None if it does something else."""
    if not read.calls(node, aten.mul.Tensor) or not read.is_floating(node):
        return None
    operands = [read.argument(node, name) for name in ("self", "other")]
    gains = [n for n in operands if program.weight(n) is not None]
    if len(gains) != 1:
        return None
    (gain,) = gains
    (value,) = [n for n in operands if n is not gain] or [None]
    if not isinstance(gain, fx.Node) or not isinstance(value, fx.Node):
        return None
    if not (read.is_floating(gain) and read.is_floating(value) and read.same_shape(value, node)):
        return None
    whole = len(read.shape(gain)) == 1 and read.has_shape(gain, read.shape(value)[-1:])
    return Gain(value, gain) if whole else None
