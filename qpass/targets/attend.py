"""Which attentions run on qpass's own operator, which reads shared heads where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.ir import Contract, Note, Pass, Program, edit, read
from qpass.ops.attention import ATTENTION
from qpass.ops.structure import REPEAT_HEADS

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class LowerAttention(Pass):
    """`scaled_dot_product_attention`, with the repeats of key and value heads that it reads.

    What compilers do with repeated heads is to write them out, a whole cache for every token.
    """

    name: str = "lower_attention"
    contract: Contract = Contract.LOWERS

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        for node in list(program.graph.nodes):
            if not read.calls(node, aten.scaled_dot_product_attention.default):
                continue
            where = read.module_path(node) or node.name
            if (why := _refusal(node)) is not None:
                notes.append(Note(False, where, f"attention is left to the compiler: {why}"))
                continue
            _lower(program, node)
            notes.append(Note(True, where, "qpass.attention"))
        edit.erase_dead(program)
        return notes


def _refusal(node: fx.Node) -> str | None:
    query, key, value = (read.value(node, name) for name in ("query", "key", "value"))
    if read.number(node, "dropout_p") != 0:
        return "it drops weights at random"
    if any(len(read.shape(x)) != 4 for x in (query, key, value)):
        return "it is not [batch, heads, length, width]"
    if not read.dtype(query) == read.dtype(key) == read.dtype(value):
        return "queries, keys and values have different precisions"
    for x in (query, key, value):
        if not isinstance(read.shape(x)[1], int) or not isinstance(read.shape(x)[3], int):
            return "the numbers of heads or their width are not fixed"
    if not read.has_shape(query, (read.shape(key)[0], *read.shape(query)[1:])):
        return "keys are shared between the entries of a batch"
    mask = read.optional_value(node, "attn_mask")
    if mask is not None and len(read.shape(mask)) > 4:
        return "its mask has more than four axes"
    heads = int(read.shape(query)[1])
    shared = {int(read.shape(x)[1]) for x in (key, value)}
    if shared != {heads} and not (read.argument(node, "enable_gqa") and len(shared) == 1):
        return "keys or values are shared by broadcasting"
    return None


def _lower(program: Program, node: fx.Node) -> None:
    query, key, value = (read.value(node, name) for name in ("query", "key", "value"))
    repeats = {_repeat(x) for x in (key, value)}
    if len(repeats) == 1 and repeats != {1}:
        key, value = (read.value(x, "x") for x in (key, value))
    scale = read.argument(node, "scale")
    width = int(read.shape(query)[3])
    new = edit.call(
        program,
        node,
        ATTENTION,
        query,
        key,
        value,
        read.optional_value(node, "attn_mask"),
        bool(read.argument(node, "is_causal")),
        read.number(node, "scale") if scale is not None else width**-0.5,
        like=node,
    )
    edit.replace(node, new)


def _repeat(x: fx.Node) -> int:
    return read.integer(x, "n") if read.calls(x, REPEAT_HEADS) else 1
