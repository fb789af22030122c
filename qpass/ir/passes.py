"""Passes: what they are, what they promise, and how they are run."""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from qpass.ir.program import Program


class Contract(enum.Enum):
    """What stays true across a pass."""

    EXACT = "the same function over the reals"
    QUANTIZES = "a new, coarser function that the pass itself defines"
    LOWERS = "the same quantized function, on other kernels"


@final
@dataclass(frozen=True, slots=True)
class Note:
    """One thing a pass did, or declined to do, and why."""

    done: bool
    where: str
    why: str


class Pass(abc.ABC):
    """A rewrite with a promise; a frozen dataclass whose fields are its options."""

    name: str
    contract: Contract

    @abc.abstractmethod
    def apply(self, program: Program) -> list[Note]:
        """Rewrite `program` in place and say what happened."""


# called with the pass and the program before and after it; returns why the pass must be undone,
# or None when all is well
Check = Callable[[Pass, Program, Program], str | None]


def run_passes(
    program: Program, passes: Sequence[Pass], check: Check | None = None
) -> tuple[Program, list[Note]]:
    """Apply `passes` in order to a copy; a pass that fails its `check` is undone and noted."""
    notes: list[Note] = []
    for step in passes:
        after = program.clone()
        made = step.apply(after)
        after.lint()
        if check is not None and (why := check(step, program, after)) is not None:
            notes.append(Note(done=False, where=step.name, why=f"undone: {why}"))
            continue
        notes += made
        program = after
    return program, notes
