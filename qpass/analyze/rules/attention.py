"""Attention: queries meet keys, weights meet values; heads and positions keep their meaning."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.atoms import Axis, Size, fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules.base import rule
from qpass.ir import read
from qpass.rotations import Group

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def _attention(node: fx.Node, c: Constraints) -> None:
    q, k, v = (read.value(node, name) for name in ("query", "key", "value"))
    # b batch and heads, s query positions, t key positions, e and f head widths
    q_bse, k_bte, v_btf = c.layout(q), c.layout(k), c.layout(v)
    c.contract(q_bse, -1, k_bte, -1)
    c.contract(k_bte, -2, v_btf, -2)
    batch = [_batch(node, i, c) for i in range(len(read.shape(node)) - 2)]
    scores = (*batch, q_bse[-2], k_bte[-2])
    if (mask := read.optional_value(node, "attn_mask")) is not None:
        for axis, own in zip(reversed(scores), reversed(c.layout(mask)), strict=False):
            if own:
                c.tie(axis, own)
    for axis in scores:
        c.limit(axis, "attention weighs each entry by itself", Group.PERMUTATION)
    if read.argument(node, "is_causal") is True:
        c.pin(scores[-2], "attention orders positions")
        c.pin(scores[-1], "attention orders positions")
    c.give(node, (*batch, q_bse[-2], v_btf[-1]))
    if read.number(node, "dropout_p") != 0:
        for touched in (q, k, v, node):
            c.pin_all(touched, "drops entries at random")


def _batch(node: fx.Node, dim: int, c: Constraints) -> Axis:
    """An axis of the result before the last two; an operand may repeat its entries along it."""
    size = size_of(read.shape(node)[dim])
    operands = [read.value(node, name) for name in ("query", "key", "value")]
    own = [(size_of(read.shape(x)[dim]), c.layout(x)[dim]) for x in operands]
    out = next((axis for n, axis in own if n == size), fresh(size))
    for n, axis in own:
        if (seen := _seen(n, axis, size)) is None:
            c.pin(axis, "is repeated a number of times only known at run time")
            c.pin(out, "is repeated a number of times only known at run time")
        elif seen:
            c.tie(out, seen)
    return out


def _seen(few: Size, axis: Axis, many: Size) -> Axis | None:
    """An operand's axis as the result sees it: each entry once, or several times in a row."""
    if few in (many, 1):
        return axis
    if isinstance(few, int) and isinstance(many, int) and many % few == 0:
        return (*axis, *fresh(many // few))
    return None
