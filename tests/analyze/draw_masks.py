"""With which arguments are operators called that replace entries, or take letters?"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.analyze.calls import Call
from tests.analyze.draws import SIZES, Draw, draws, narrowed, shape, tensor

aten = torch.ops.aten

VALUES = st.sampled_from((0, 0.0, -2.5, 1, 3.0))


def mask(draw: Draw, full: tuple[int, ...], *, single: bool = True) -> Tensor:
    """A mask with both values, if there is room; else the `single` one, which says more."""
    made = tensor(draw, narrowed(draw, full)) > 0
    flat = made.flatten()
    flat[:1] = single
    flat[1:2] = not single
    return flat.reshape(made.shape)


@draws(aten.zeros.default)
def _zeros(draw: Draw, target: Any) -> Call:
    return Call(target, (list(shape(draw)),), {"dtype": torch.float64})


@draws(aten.zeros_like.default)
def _zeros_like(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)),))


@draws(aten.new_zeros.default)
def _new_zeros(draw: Draw, target: Any) -> Call:
    return Call(target, (tensor(draw, shape(draw)), list(shape(draw))))


@draws(aten.where.self)
def _where(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    sides = [tensor(draw, narrowed(draw, full)) for _ in range(2)]
    return Call(target, (mask(draw, full), *sides))


@draws(aten.where.ScalarOther, aten.where.ScalarSelf)
def _where_number(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    value, number = tensor(draw, narrowed(draw, full)), draw(VALUES)
    if target is aten.where.ScalarOther:
        return Call(target, (mask(draw, full, single=False), value, number))
    return Call(target, (mask(draw, full), number, value))


@draws(aten.masked_fill.Scalar)
def _fill(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    return Call(target, (tensor(draw, narrowed(draw, full)), mask(draw, full), draw(VALUES)))


@draws(aten.masked_fill.Tensor)
def _fill_value(draw: Draw, target: Any) -> Call:
    full = shape(draw)
    value = tensor(draw, ())
    return Call(target, (tensor(draw, narrowed(draw, full)), mask(draw, full), value))


@draws(aten.einsum.default)
def _einsum(draw: Draw, target: Any) -> Call:
    letters = "abcd"
    sizes = {letter: draw(st.sampled_from(SIZES)) for letter in letters}
    dots = shape(draw, 1, 1)
    terms, operands = [], []
    for _ in range(draw(st.integers(1, 3))):
        term = "".join(draw(st.lists(st.sampled_from(letters), min_size=1, max_size=3)))
        own = [1 if draw(st.integers(0, 5)) == 5 else sizes[x] for x in term]
        if len(set(term)) < len(term):
            own = [sizes[x] for x in term]
        dotted = draw(st.booleans())
        terms.append("..." * dotted + term)
        operands.append(tensor(draw, (*(dots if dotted else ()), *own)))
    equation = ",".join(terms)
    if draw(st.booleans()):
        known = sorted(set("".join(terms)) - {"."})
        kept = draw(st.permutations([x for x in known if draw(st.booleans())]))
        equation += "->" + "..." * ("..." in equation) + "".join(kept)
    return Call(target, (equation, operands))
