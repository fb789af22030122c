"""Which sums of squares are the squared length of rows: a rotation leaves those alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Program, edit, read

aten = torch.ops.aten

_SUMS = frozenset({aten.mean.dim, aten.sum.dim_IntList})


def _raise_length(program: Program, total: fx.Node) -> Note | None:
    """Take the sum or mean of squares from a length, where no norm has been recognised."""
    x = _squared(read.uncast(read.value(total, "self")))
    dims = read.argument(total, "dim")
    if x is None or not dims or not read.is_floating(x) or program.weight(x) is not None:
        return None
    axes = [dims] if isinstance(dims, int) else list(cast("list[int]", dims))
    sizes = [read.shape(x)[axis] for axis in axes]
    if not all(isinstance(size, int) for size in sizes):
        return None
    kind = read.dtype(total)
    if read.dtype(x) != kind:
        x = edit.call(program, total, aten.to.dtype, x, kind)
    keep = read.argument(total, "keepdim") is True
    length = edit.call(program, total, aten.linalg_vector_norm.default, x, 2, axes, keep)
    square = edit.call(program, total, aten.mul.Tensor, length, length)
    if read.calls(total, aten.mean.dim):
        count = 1
        for size in cast("list[int]", sizes):
            count *= size
        square = edit.call(program, total, aten.div.Tensor, square, count)
    edit.replace(total, square)
    return None


def _squared(node: fx.Node) -> fx.Node | None:
    """What a node is the square of, or None."""
    if read.calls(node, aten.square.default):
        return read.value(node, "self")
    if read.calls(node, aten.pow.Tensor_Scalar) and read.number(node, "exponent") == 2:
        return read.value(node, "self")
    if read.calls(node, aten.mul.Tensor) and read.argument(node, "self") is read.argument(
        node, "other"
    ):
        return read.value(node, "self")
    return None


RAISINGS.add(Raising("lengths", _SUMS, _raise_length, after=("norm", "norm_affine")))
