"""Which values are repeated only to meet others entry by entry: broadcasting does that."""

from __future__ import annotations

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Program, edit, read

aten = torch.ops.aten

_BINARY = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


def _drop_expands(program: Program, node: fx.Node) -> Note | None:
    """Let a sum or product read what was expanded for it, where the result has the same shape."""
    del program
    for name in ("self", "other"):
        operand = read.argument(node, name)
        if not isinstance(operand, fx.Node) or not read.calls(
            operand, aten.expand.default, aten.expand_as.default
        ):
            continue
        source = read.value(operand, "self")
        other = read.argument(node, "other" if name == "self" else "self")
        if (
            isinstance(other, fx.Node)
            and other is not operand
            and read.fake(other) is not None
            and _fills(other, source, node)
        ):
            edit.redirect(node, operand, source)
    return None


def _fills(other: fx.Node, source: fx.Node, node: fx.Node) -> bool:
    """Whether `other` alone has the shape of the result, to which `source` broadcasts."""
    return read.same_shape(other, node) and len(read.shape(source)) <= len(read.shape(node))


RAISINGS.add(Raising("expands", _BINARY, _drop_expands))
