"""Which products with a matrix, and sums with a vector, are linear layers written out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Permute, Program, Step, Weight, edit, read
from qpass.ir.match import unscaled

aten = torch.ops.aten

_TURNED = Permute((1, 0))


def _raise_product(program: Program, node: fx.Node) -> Note | None:
    """Replace `x @ w` by `linear(x, w.T)` for a weight `w` of two axes."""
    x = read.value(node, "self")
    w = read.value(node, "other" if read.calls(node, aten.matmul.default) else "mat2")
    shape = read.static_shape(w)
    if program.weight(w) is None or program.weight(x) is not None or shape is None:
        return None
    if len(shape) != 2:
        return None
    like, owner = read.fake(w), program.owners.get(w.name)
    assert like is not None
    if owner is not None:
        owner = replace(owner, prefix=_turned(owner.prefix))
    turned = Weight(program.weights[w.name].source, _turned(program.weights[w.name].steps))
    matrix = edit.derive_use(program, w, turned, like.t(), owner)
    edit.replace(node, edit.respell(program, node, aten.linear.default, x, matrix))
    return Note(done=True, where=read.module_path(matrix), why="raised to aten.linear")


def _turned(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return steps[:-1] if steps[-1:] == (_TURNED,) else (*steps, _TURNED)


def _raise_bias(program: Program, node: fx.Node) -> Note | None:
    """Let a linear layer add the vector that its own module adds to it."""
    for name, other in (("self", "other"), ("other", "self")):
        product, bias = (read.optional_value(node, n) for n in (name, other))
        if product is None or bias is None or unscaled(node) is not None:
            continue
        if not read.calls(product, aten.linear.default) or len(product.users) != 1:
            continue
        if read.argument(product, "bias") is not None or not _adds(program, product, bias, node):
            continue
        x, matrix = read.value(product, "input"), read.value(product, "weight")
        edit.replace(node, edit.respell(program, node, aten.linear.default, x, matrix, bias))
        return Note(done=True, where=read.module_path(product), why="the layer takes a bias")
    return None


def _adds(program: Program, product: fx.Node, bias: fx.Node, total: fx.Node) -> bool:
    """Whether `bias` is a vector that the module of the product's weight holds."""
    vector = read.static_shape(bias)
    if program.weight(bias) is None or vector is None or len(vector) != 1:
        return False
    matrix = read.value(product, "weight")
    owners = [program.owners.get(use.name) for use in (matrix, bias)]
    if None in owners or len({owner.module for owner in owners if owner is not None}) != 1:
        return False
    whole = read.static_shape(matrix)
    return whole is not None and whole[0] == vector[0] and read.same_type(product, total)


RAISINGS.add(Raising("linear", frozenset({aten.matmul.default, aten.mm.default}), _raise_product))
RAISINGS.add(Raising("linear_bias", frozenset({aten.add.Tensor}), _raise_bias, after=("linear",)))
