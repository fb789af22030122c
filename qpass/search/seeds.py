"""The best of several random rotations, and none: signs alone make rotations differ by much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Transform
from qpass.search.holdout import Holdout
from qpass.search.products import prepare
from qpass.search.regions import Turning

# how many other seeds are tried, beside the recipe's own and the identity
SEEDS = 8


@final
@dataclass(frozen=True, slots=True)
class Seeds(Chooser):
    """Replaces the rotations that a plan folds by those of another seed, or by identities.

    Candidates are ranked by what the errors of products cost, and the first of them is compared
    with the start on data that had no part in it.
    """

    name: str = "seeds"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        prepared = prepare(task)
        if isinstance(prepared, str):
            return task.plan, (Note(False, self.name, prepared),)
        trial, products = prepared
        first = task.plan.recipe.seed
        plans = [task.plan, _named(task.plan, trial.turning, "identity", first)]
        plans += [_named(task.plan, trial.turning, None, first + s) for s in range(1, SEEDS + 1)]
        costs: list[float] = []
        for at, plan in enumerate(plans):
            task.advance("try seeds", at, len(plans))
            generator = torch.Generator(device="cpu").manual_seed(first)
            with torch.no_grad():
                matrices = _further(trial.turning, plan)
                costs.append(float(products.loss(matrices, generator, 1.0)))
        task.advance("try seeds", len(plans), len(plans))
        best = min(range(len(plans)), key=costs.__getitem__)
        return Holdout(task).better(plans[best], self.name, f"best of {len(plans)} seeds")


def _named(plan: Plan, turning: Turning, rotation: str | None, seed: int) -> Plan:
    """The plan with another rotation or seed wherever one by name is folded."""
    regions = {choice.region for stack in turning.stacks for choice in stack}
    return replace(
        plan,
        rotated=tuple(
            replace(
                choice,
                transform=replace(
                    choice.transform, seed=seed, rotation=rotation or choice.transform.rotation
                ),
            )
            if choice.region in regions and isinstance(choice.transform, Transform)
            else choice
            for choice in plan.rotated
        ),
    )


def _further(turning: Turning, plan: Plan) -> list[Tensor]:
    """What takes the values of the start to those of another plan."""
    transforms = {choice.region: choice.transform for choice in plan.rotated}
    found: list[Tensor] = []
    for stack in turning.stacks:
        before, after = stack[0].transform, transforms[stack[0].region]
        found.append((before.matrix().mT @ after.matrix()).float())
    return found


CHOOSERS.add(Seeds())
