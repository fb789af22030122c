"""Rotations and scales learned together, by the gradients of the whole quantized model.

Hu et al., OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling
Transformations for Better Distribution Fitting, 2025. Rotations that are folded turn further and
every free region of positive diagonals is scaled, in front of what runs with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.search.holdout import Holdout, split
from qpass.search.learning import Best, affordable, learn
from qpass.search.regions import Turning
from qpass.search.scaling import Scaling
from qpass.search.trial import Trial
from qpass.search.whole import Whole
from qpass.transform import carry_out

# each coordinate turns, and each logarithm of a scale moves, by about this much at first
RATE = 0.02
# multiplications that learning may take, and how many steps that may be
WORK, LEAST_STEPS, MOST_STEPS = 1.2e13, 10, 100


@final
@dataclass(frozen=True, slots=True)
class OstQuant(Chooser):
    """Turns every folded rotation of the plan further and scales what scales are free for."""

    name: str = "ostquant"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        if not task.plan.quantized:
            return task.plan, (Note(False, self.name, "nothing is rounded"),)
        after = carry_out(task.program, task.folded, task.plan).program
        bare = carry_out(task.program, task.folded, replace(task.plan, online=())).program
        turning = Turning.of(task.folded, after, task.plan)
        scaling = Scaling.of(bare, after, task.plan)
        if not turning.stacks and not scaling.regions:
            why = "nothing that is folded can turn, and no region can be scaled"
            return task.plan, (Note(False, self.name, why),)
        trial = Trial(after, task.plan, turning, scaling)
        best = Best(trial, Holdout(task))
        learning, _ = split(task.batches)
        whole = Whole(trial, task.program, learning, trial.clips())
        generator = torch.Generator(device="cpu").manual_seed(task.plan.recipe.seed)

        def loss(parameters: Sequence[Tensor], _at: int) -> Tensor:
            at = int(torch.randint(len(learning), (), generator=generator))
            return whole.loss(parameters, at)

        steps = affordable(WORK, whole.work(), LEAST_STEPS, MOST_STEPS)
        learn(best, loss, steps, RATE, lambda at, of: task.advance("turn and scale", at, of))
        return best.taken(task.plan, self.name, f"{len(scaling.regions)} regions scaled")


CHOOSERS.add(OstQuant())
