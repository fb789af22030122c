"""What finds transforms from data: a plan becomes another plan, whatever the method."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from qpass.ir import Note, Program
from qpass.plan.plan import Plan
from qpass.registry import Registry


class Advance(Protocol):
    """Is told what is done, how far it is, and of how much."""

    def __call__(self, task: str, done: int, total: int) -> None: ...


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
