"""Which values meet which weights in a matrix product, and on which axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.ir import Program, read

aten = torch.ops.aten


@final
@dataclass(frozen=True, slots=True)
class Matmul:
    """A matrix product of a value with one use of a 2-D weight.

    The weight's axis `reads` is contracted with the last axis of `value`; its axis `writes` becomes
    the last axis of `node`. `bias` is the use that is added, if the operator adds one.
    """

    node: str
    value: str
    use: str
    reads: int
    writes: int
    bias: str | None

    @property
    def takes_bias(self) -> bool:
        """Whether the operator itself can add a bias."""
        return self.bias is not None or self.reads == 1


def find_matmuls(program: Program) -> tuple[Matmul, ...]:
    """Every product of a value with a 2-D weight, in graph order."""
    return tuple(m for n in program.graph.nodes if (m := _matmul(program, n)) is not None)


def _matmul(program: Program, node: fx.Node) -> Matmul | None:
    if read.calls(node, aten.linear.default):
        value, weight = read.value(node, "input"), read.value(node, "weight")
        bias, reads = read.optional_value(node, "bias"), 1
    elif read.calls(node, aten.addmm.default):
        if read.number(node, "alpha") != 1 or read.number(node, "beta") != 1:
            return None
        value, weight = read.value(node, "mat1"), read.value(node, "mat2")
        bias, reads = read.value(node, "self"), 0
    elif read.calls(node, aten.mm.default):
        value, weight, bias, reads = read.value(node, "self"), read.value(node, "mat2"), None, 0
    elif read.calls(node, aten.matmul.default):
        value, weight, bias, reads = read.value(node, "self"), read.value(node, "other"), None, 0
    else:
        return None
    if program.weight(weight) is None or len(read.shape(weight)) != 2:
        return None
    if program.weight(value) is not None or not _absorbs(program, bias):
        return None
    name = bias.name if bias is not None else None
    return Matmul(node.name, value.name, weight.name, reads, 1 - reads, name)


def _absorbs(program: Program, bias: fx.Node | None) -> bool:
    return bias is None or (program.weight(bias) is not None and len(read.shape(bias)) == 1)
