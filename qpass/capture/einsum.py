"""How an einsum that is one product of matrices is written with permute and matmul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.ir import Program, edit, read

aten = torch.ops.aten


@final
@dataclass(frozen=True, slots=True)
class _Operand:
    """A value with a letter for each of its axes."""

    node: fx.Node
    letters: str


@final
@dataclass(frozen=True, slots=True)
class _Product:
    """Two operands, the letters of their product by role, and how long each axis is."""

    a: _Operand
    b: _Operand
    batch: str  # in both operands and the result
    summed: str  # in both operands alone
    left: str  # in the first and the result
    right: str  # in the second and the result
    sizes: dict[str, read.Size]


def spell_out_einsums(program: Program) -> None:
    """Replace each einsum that is one product of matrices; any other stays."""
    for node in list(program.graph.nodes):
        if not read.calls(node, aten.einsum.default):
            continue
        given, arrow, result = str(read.argument(node, "equation")).replace(" ", "").partition("->")
        operands = read.values(node, "tensors")
        terms = given.split(",")
        if len(operands) != 2 or not arrow:
            continue
        a, b = (_Operand(n, term) for n, term in zip(operands, terms, strict=True))
        if program.weight(a.node) is not None:
            # values stand on the left of their weights, as in a linear
            a, b = b, a
        product = _product(a, b, result) or _product(b, a, result)
        if product is not None:
            edit.replace(node, _spelled_out(program, node, product, result))


def _product(a: _Operand, b: _Operand, result: str) -> _Product | None:
    """The roles of the letters, or None where the equation is no single product of matrices."""
    if any(len(set(t)) != len(t) or not t.isalpha() for t in (a.letters, b.letters, result)):
        return None
    sizes: dict[str, read.Size] = {}
    for operand in (a, b):
        for letter, size in zip(operand.letters, read.shape(operand.node), strict=True):
            # an axis of length 1 broadcasts against a longer one
            if not read.same_size(sizes.setdefault(letter, size), size):
                return None
    both = set(a.letters) & set(b.letters)
    if set(a.letters + b.letters) != both | set(result):
        return None
    product = _Product(
        a,
        b,
        batch="".join(c for c in result if c in both),
        summed="".join(c for c in a.letters if c in both and c not in result),
        left="".join(c for c in result if c not in b.letters),
        right="".join(c for c in result if c not in a.letters),
        sizes=sizes,
    )
    merged = product.right + (product.left if product.batch else "")
    fixed = all(isinstance(sizes[c], int) for c in merged)
    whole = len(product.right) == 1 and (not product.batch or len(product.left) == 1)
    if not (product.summed and product.left and product.right) or not (fixed or whole):
        return None
    return product


def _spelled_out(program: Program, before: fx.Node, p: _Product, result: str) -> fx.Node:
    a = _permuted(program, before, p.a, p.batch + p.left + p.summed)
    a = _merged(program, before, a, len(p.batch + p.left), len(p.summed))
    if p.batch:
        a = _merged(program, before, a, len(p.batch), len(p.left))
    b = _permuted(program, before, p.b, p.batch + p.summed + p.right)
    b = _merged(program, before, b, len(p.batch + p.summed), len(p.right))
    b = _merged(program, before, b, len(p.batch), len(p.summed))
    product = edit.call(program, before, aten.matmul.default, a, b)
    product = _split(program, before, product, -1, [p.sizes[c] for c in p.right])
    if p.batch:
        product = _split(program, before, product, len(p.batch), [p.sizes[c] for c in p.left])
    return _permuted(program, before, _Operand(product, p.batch + p.left + p.right), result)


def _permuted(program: Program, before: fx.Node, operand: _Operand, letters: str) -> fx.Node:
    if operand.letters == letters:
        return operand.node
    order = [operand.letters.index(letter) for letter in letters]
    return edit.call(program, before, aten.permute.default, operand.node, order)


def _merged(program: Program, before: fx.Node, node: fx.Node, axis: int, count: int) -> fx.Node:
    if count == 1:
        return node
    return edit.call(program, before, aten.flatten.using_ints, node, axis, axis + count - 1)


def _split(
    program: Program, before: fx.Node, node: fx.Node, axis: int, sizes: list[read.Size]
) -> fx.Node:
    if len(sizes) == 1:
        return node
    return edit.call(program, before, aten.unflatten.int, node, axis, sizes)
