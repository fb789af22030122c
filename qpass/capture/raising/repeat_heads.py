"""Which expansions repeat each key or value head for the queries that share it."""

from __future__ import annotations

import torch
from torch import fx

from qpass.capture.raising.base import RAISINGS, Raising
from qpass.ir import Note, Program, edit, read
from qpass.ops import structure

aten = torch.ops.aten


def _raise_expansion(program: Program, expand: fx.Node) -> Note | None:
    """Replace unsqueeze, expand and reshape of `[b, h, t, d]` to `[b, h * n, t, d]`."""
    if read.calls(expand, aten.repeat_interleave.self_int):
        return _raise_interleave(program, expand)
    column = read.value(expand, "self")
    if not read.calls(column, aten.unsqueeze.default):
        return None
    x = read.value(column, "self")
    if len(read.shape(x)) != 4 or read.flat_axis(column, read.integer(column, "dim")) != 2:
        return None
    b, h, t, d = read.shape(x)
    n = read.shape(expand)[2]
    where = read.module_path(expand)
    if not isinstance(n, int) or not isinstance(h, int):
        return Note(done=False, where=where, why="the number of repeated heads is not fixed")
    if not read.has_shape(expand, (b, h, n, t, d)):
        return None
    done = False
    for reader in list(expand.users):
        if read.calls(reader, aten.reshape.default) and read.has_shape(reader, (b, h * n, t, d)):
            edit.replace(reader, edit.respell(program, reader, structure.REPEAT_HEADS, x, n))
            done = True
    why = "raised to qpass.repeat_heads" if done else "the repeats do not become heads"
    return Note(done=done, where=where, why=why)


def _raise_interleave(program: Program, node: fx.Node) -> Note | None:
    x, n = read.value(node, "self"), read.argument(node, "repeats")
    if len(read.shape(x)) != 4 or read.argument(node, "dim") not in (1, -3):
        return None
    if not isinstance(n, int):
        return None
    edit.replace(node, edit.respell(program, node, structure.REPEAT_HEADS, x, n))
    return Note(done=True, where=read.module_path(x), why="raised to qpass.repeat_heads")


def _raise_grouped(program: Program, attention: fx.Node) -> Note | None:
    """Write attention with fewer key than query heads as attention on repeated heads."""
    if not read.argument(attention, "enable_gqa"):
        return None
    where = read.module_path(attention)
    queries = read.shape(read.value(attention, "query"))[-3]
    for name in ("key", "value"):
        x = read.value(attention, name)
        heads = read.shape(x)[-3]
        if len(read.shape(x)) != 4 or not isinstance(queries, int) or not isinstance(heads, int):
            return Note(done=False, where=where, why="the numbers of heads are not fixed")
        if queries != heads:
            repeated = edit.call(program, attention, structure.REPEAT_HEADS, x, queries // heads)
            edit.set_argument(attention, name, repeated)
    edit.set_argument(attention, "enable_gqa", False)
    return Note(done=True, where=where, why="shared heads are repeated by qpass.repeat_heads")


RAISINGS.add(
    Raising(
        "repeat_heads",
        frozenset({aten.expand.default, aten.repeat_interleave.self_int}),
        _raise_expansion,
    )
)
RAISINGS.add(
    Raising(
        "grouped_attention",
        frozenset({aten.scaled_dot_product_attention.default}),
        _raise_grouped,
        after=("attention",),
    )
)
