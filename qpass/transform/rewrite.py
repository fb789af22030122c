"""Carry out the exact half of a plan, and undo what does not keep its promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, final

from qpass.ir import Check, Note, Pass, Program, run_passes
from qpass.plan import Declined, Plan
from qpass.transform.insert_online import InsertOnline
from qpass.transform.rotate_regions import RotateRegions

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rewritten:
    """The program after a plan's rotations, and the plan without those that were undone."""

    program: Program
    plan: Plan
    notes: tuple[Note, ...]


def rewrite(program: Program, plan: Plan, check: Check | None = None) -> Rewritten:
    """Rotate regions and insert online transforms; `program` has its norms folded.

    When `check` refuses a whole group of choices, its halves are tried apart, so that one bad
    region does not cost the others.
    """
    after, rotated, notes = _apply(program, plan.rotated, RotateRegions, check)
    after, online, more = _apply(after, plan.online, InsertOnline, check)
    undone = tuple(
        Declined(name, "its transform was undone: the outputs moved")
        for name in (
            *(r.region for r in plan.rotated if r not in rotated),
            *(o.site for o in plan.online if o not in online),
        )
    )
    kept = replace(plan, rotated=rotated, online=online, declined=(*plan.declined, *undone))
    return Rewritten(after, kept, (*notes, *more))


def _apply(
    program: Program,
    choices: tuple[T, ...],
    make: Callable[[tuple[T, ...]], Pass],
    check: Check | None,
) -> tuple[Program, tuple[T, ...], tuple[Note, ...]]:
    if not choices:
        return program, (), ()
    after, notes = run_passes(program, [make(choices)], check)
    if after is not program:
        return after, choices, tuple(notes)
    if len(choices) == 1:
        return program, (), tuple(notes)
    middle = len(choices) // 2
    after, first, before = _apply(program, choices[:middle], make, check)
    after, second, behind = _apply(after, choices[middle:], make, check)
    return after, (*first, *second), (*before, *behind)
