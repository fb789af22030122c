"""Attention: queries meet keys, weights meet values; heads and positions keep their meaning."""

from __future__ import annotations

import torch
from torch import fx

from qpass.analyze.atoms import Axis, fresh, size_of
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
    for i in range(len(q_bse) - 2):
        c.tie(k_bte[i], v_btf[i])
        c.tie(q_bse[i], _repeated(q, k, i, k_bte[i], c))
        c.limit(q_bse[i], "attention runs head by head", Group.PERMUTATION)
    for axis in (q_bse[-2], k_bte[-2]):
        c.pin(axis, "attention orders positions")
    if (mask := read.optional_value(node, "attn_mask")) is not None and mask in c.layouts:
        c.pin_all(mask, "masks attention")
        if len(c.layout(mask)) > 2 and c.layout(mask)[-3]:
            c.pin(q_bse[-3], "the mask differs from head to head")
    c.give(node, (*q_bse[:-1], v_btf[-1]))


def _repeated(q: fx.Node, k: fx.Node, dim: int, heads: Axis, c: Constraints) -> Axis:
    """The key heads as the queries see them: each repeated over its group."""
    many, few = size_of(read.shape(q)[dim]), size_of(read.shape(k)[dim])
    if many == few or not isinstance(many, int) or not isinstance(few, int):
        return heads
    repeat = fresh(many // few)
    c.limit(repeat, "repeats one head", Group.PERMUTATION)
    return (*heads, *repeat)
