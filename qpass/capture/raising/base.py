"""What a raising is, and in which order they are tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import fx
from torch._ops import OpOverload

from qpass.ir import Note, Program, edit, read
from qpass.ir.alias import written_memory
from qpass.registry import Registry


@final
@dataclass(frozen=True, slots=True)
class Raising:
    """Replaces a spelled-out idiom by one operator that computes the same function over the reals.

    `raise_at` is called on each call of one of `anchors`; it says what it did or why it declined,
    or None where the anchor is no part of the idiom at all. `after` names raisings to run before.
    """

    name: str
    anchors: frozenset[OpOverload]
    raise_at: Callable[[Program, fx.Node], Note | None]
    after: tuple[str, ...] = ()


RAISINGS: Registry[Raising] = Registry("raising", "qpass.capture.raising")


def raise_idioms(program: Program) -> list[Note]:
    """Apply every raising wherever its idiom is found.

    A raised operator reads its arguments later than the idiom did, so a graph that writes to
    values of its own is left alone.
    """
    if own := [n for n in written_memory(program.graph) if n.op != "placeholder"]:
        why = f"the graph writes in place to a result of {read.target_name(own[0])}"
        return [Note(done=False, where=read.module_path(own[0]), why=why)]
    notes: list[Note] = []
    done: set[str] = set()
    waiting = sorted(RAISINGS, key=lambda raising: raising.name)
    while waiting:
        ready = next(r for r in waiting if done.issuperset(r.after))
        waiting.remove(ready)
        done.add(ready.name)
        for node in list(program.graph.nodes):
            if node.target in ready.anchors and node.users:
                note = ready.raise_at(program, node)
                notes += [] if note is None else [note]
        edit.erase_dead(program)
    program.lint()
    return notes
