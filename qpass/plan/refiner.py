"""What changes a rounded model further on data, whatever its formats, roundings and transforms."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantizedTensor
from qpass.ir import Note, Program
from qpass.plan.chooser import Advance, unseen
from qpass.plan.plan import Plan
from qpass.plan.recipe import Recipe
from qpass.registry import Registry


class Held(Protocol):
    """Quantized weights by site."""

    def get(self, site: str) -> QuantizedTensor | None: ...

    def put(self, site: str, tensor: QuantizedTensor) -> None: ...


@final
@dataclass(frozen=True, slots=True, eq=False)
class Refining:
    """A model that has been rounded, and the data that may change it further.

    `batches` are flat as the program takes them, `kept` has one mask `[...]` of tokens for each, or
    None where all count. `codes` hold every quantized weight. What is found is put into `codes`,
    and into the weights of `program` that stay float; `reference` is the program as it was.
    """

    program: Program
    reference: Program
    plan: Plan
    batches: Sequence[Sequence[object]]
    kept: Sequence[Tensor | None]
    codes: Held
    advance: Advance = unseen


class Refiner(abc.ABC):
    """A method; the same for equal tasks, and never worse than its start on held-out data."""

    name: str

    @abc.abstractmethod
    def refine(self, task: Refining) -> tuple[Note, ...]:
        """Change the codes and weights of `task`, and say what was gained or declined."""


REFINERS: Registry[Refiner] = Registry("refinement", "qpass.refine")


def refined(task: Refining) -> tuple[Note, ...]:
    """Carry out all methods of the recipe, in order, and say what each gained."""
    notes: list[Note] = []
    for method in task.plan.recipe.refinements:
        notes += REFINERS[method].refine(task)
    return tuple(notes)


def expect_refinable(recipe: Recipe, *, given: bool) -> None:
    """Raise BadInput for a recipe whose refinements want data, where there is none."""
    if recipe.refinements and not given:
        raise BadInput(
            f"refine = {recipe.refine!r}: rests on data, and there is none\n"
            "  call qpass.quantize with calibration batches"
        )
