"""What finds transforms from data: a plan becomes another plan, whatever the method."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

from qpass.errors import BadInput
from qpass.ir import Note, Program
from qpass.plan.plan import Plan
from qpass.plan.recipe import Recipe
from qpass.registry import Registry

# is told what is done, how far it is, and of how much
Advance = Callable[[str, int, int], None]


def unseen(task: str, done: int, total: int) -> None:
    """Show no progress."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A model and the data that transforms are found from.

    `plan` is what is done without data: the start, which is always a candidate. `batches` are
    calibration data, flat as the program takes them; some of them are held out for choices.
    """

    program: Program
    folded: Program
    plan: Plan
    batches: Sequence[tuple[object, ...]]
    advance: Advance = unseen


class Chooser(abc.ABC):
    """A method; the same for equal tasks, so what it may cost is counted and not timed."""

    name: str

    @abc.abstractmethod
    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        """The plan of `task` with better transforms, or itself, and what was gained."""


CHOOSERS: Registry[Chooser] = Registry("transform", "qpass.search")


def improved(task: Task) -> tuple[Plan, tuple[Note, ...]]:
    """The plan of `task` after all methods of its recipe, in order, and what each gained."""
    plan, notes = task.plan, list[Note]()
    for method in plan.recipe.methods:
        plan, more = CHOOSERS[method].choose(replace(task, plan=plan))
        notes += more
    return plan, tuple(notes)


def expect_data(recipe: Recipe, *, given: bool) -> None:
    """Raise BadInput for a recipe whose methods want data, where there is none."""
    if recipe.methods and not given:
        raise BadInput(
            f"transform = {recipe.transform!r}: is found from data, and there is none\n"
            "  call qpass.quantize with calibration batches, or give a plan that was found"
        )
