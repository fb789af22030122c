"""Which tensors are numbers that the code happens to write as tensors."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from qpass.ir import Program, edit, read

aten = torch.ops.aten

_COMMUTE = (aten.add.Tensor, aten.mul.Tensor)
_BINARY = (*_COMMUTE, aten.sub.Tensor, aten.div.Tensor)


def write_numbers(program: Program, constants: Collection[str]) -> None:
    """Let arithmetic read numbers where it reads tensors without axes that the code itself made.

    `torch.tensor(0.5) * x` then reads as `x * 0.5`; `constants` are the sources that no module
    holds.
    """
    for node in list(program.graph.nodes):
        if not read.calls(node, *_BINARY):
            continue
        x, other = (read.optional_value(node, name) for name in ("self", "other"))
        if x is None or other is None:
            continue
        number = _number(program, other, constants)
        if number is None and read.calls(node, *_COMMUTE) and _plain(node):
            x, number = other, _number(program, x, constants)
        # a number never widens the element type of a tensor, a tensor of another kind may
        if number is not None and read.dtype(x) == read.dtype(node):
            edit.set_argument(node, "self", x)
            edit.set_argument(node, "other", number)
    edit.erase_dead(program)


def _plain(node: fx.Node) -> bool:
    return read.calls(node, aten.mul.Tensor) or read.number(node, "alpha") == 1


def _number(program: Program, node: fx.Node, constants: Collection[str]) -> float | None:
    if read.static_shape(node) != ():
        return None
    if read.calls(node, aten.full.default):
        return read.number(node, "fill_value")
    if read.calls(node, aten.scalar_tensor.default):
        return read.number(node, "s")
    weight = program.weight(node)
    if weight is None or weight.source not in constants or not read.is_floating(node):
        return None
    return weight.evaluate(program.sources).item()
