"""Which values are written to memory once instead of computed again by each of their readers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.analyze import MOVES
from qpass.ir import Contract, Note, Pass, Program, edit, read
from qpass.ops.attention import ATTENTION
from qpass.ops.materialize import MATERIALIZE

aten = torch.ops.aten

# dozens of instructions an entry, which inductor counts as cheap and repeats in every reader
_COSTLY = (aten.cos.default, aten.sin.default)


@final
@dataclass(frozen=True)
class ComputeOnce(Pass):
    """The angles of rotary positions, and the masks of attention, which every layer reads."""

    name: str = "compute_once"
    contract: Contract = Contract.LOWERS

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        for node in [*_angles(program), *_masks(program)]:
            kept = edit.call(program, edit.after(program, node), MATERIALIZE, node, like=node)
            for user in [user for user in node.users if user is not kept]:
                edit.redirect(user, node, kept)
            notes.append(Note(True, read.module_path(node) or node.name, "computed once"))
        return notes


def _angles(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if read.calls(n, *_COSTLY) and _shared(n)]


def _shared(node: fx.Node) -> bool:
    """Whether a value, or what a chain of operators makes of it, has several readers."""
    while len(node.users) == 1:
        (node,) = node.users
    return len(node.users) > 1


def _masks(program: Program) -> list[fx.Node]:
    """What several attentions take their masks from."""
    origins: Counter[fx.Node] = Counter()
    for node in program.graph.nodes:
        if read.calls(node, ATTENTION) and (mask := read.optional_value(node, "mask")) is not None:
            # each layer may cut its own view
            while read.calls(mask, *MOVES):
                (mask, *_) = mask.all_input_nodes
            origins[mask] += 1
    return [mask for mask, count in origins.items() if count > 1 and mask.op == "call_function"]
