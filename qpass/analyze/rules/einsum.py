"""Einsum: what a letter means depends on which operands and whether the result has it."""

from __future__ import annotations

import functools
import string
from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.analyze.atoms import Axis, fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten


@rule(aten.einsum.default)
def _einsum(node: fx.Node, c: Constraints) -> None:
    operands = read.values(node, "tensors")
    terms, result = letters(
        str(read.argument(node, "equation")), [len(read.shape(n)) for n in operands]
    )
    places: dict[str, list[_Place]] = {}
    for operand, term in zip(operands, terms, strict=True):
        for dim, letter in enumerate(term):
            places.setdefault(letter, []).append(_Place(operand, dim, term.count(letter) > 1))
    axes = {letter: _axis(found, c, kept=letter in result) for letter, found in places.items()}
    shape = [size_of(size) for size in read.shape(node)]
    c.give(node, [axes[letter] or fresh(n) for letter, n in zip(result, shape, strict=True)])


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """An axis of an operand; `diagonal` if another axis of it has the same letter."""

    node: fx.Node
    dim: int
    diagonal: bool


def letters(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """A letter for each axis of each operand and of the result; `...` is written out."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    terms = given.split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    widths = [n - len(term.replace("...", "")) for n, term in zip(ranks, terms, strict=True)]
    dots = "".join(unused[: max(widths)]) if "..." in given else ""
    terms = [t.replace("...", dots[len(dots) - n :]) for t, n in zip(terms, widths, strict=True)]
    if not arrow:
        every = "".join(terms)
        result = "..." * bool(dots) + "".join(
            sorted(x for x in set(every) if every.count(x) == 1 and x not in dots)
        )
    return terms, result.replace("...", dots)


def _axis(places: list[_Place], c: Constraints, *, kept: bool) -> Axis:
    """Say how the axes of one letter are related; returns that of the result."""
    filled = [axis for place in places if (axis := c.layout(place.node)[place.dim])]
    if any(place.diagonal for place in places):
        for axis in filled:
            c.pin(axis, "only its diagonal is read")
        return filled[0] if kept and filled else ()
    if not kept:
        for place in places:
            c.mix(c.layout(place.node), place.dim)
            if len(filled) > 1 and c.program.weight(place.node) is not None:
                c.absorb(place.node, place.dim)
    if not kept and len(filled) == 1:
        c.limit(filled[0], "is summed over", Group.ORTHOGONAL_ONES)
    elif not kept and len(filled) == 2:
        c.tie(filled[0], filled[1], power=-1)
    elif kept and len(filled) > 1:
        why = "each entry of one meets the same entry of the other"
        return functools.reduce(lambda x, y: c.multiply(x, y, why), filled)
    elif len(filled) > 1:
        for axis in filled:
            c.limit(axis, "each entry of one meets the same entry of the other", Group.PERMUTATION)
            c.tie(filled[0], axis)
    return filled[0] if kept and filled else ()
