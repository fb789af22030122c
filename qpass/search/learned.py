"""Learned rotations: every folded rotation is turned further, to where quantizing costs least.

All free regions are learned at once, on the group itself, by the gradients of the whole quantized
model (Liu et al., SpinQuant: LLM quantization with learned rotations, 2024). Its loss is the
divergence from the float model. Before that, cheap steps lower what the errors of products cost on
samples, which needs no whole run. The outputs decide, on calibration data that nothing was learned
from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.search.holdout import Holdout, split
from qpass.search.learning import Best, affordable, learn
from qpass.search.products import Products, prepare
from qpass.search.trial import Trial
from qpass.search.whole import Whole

# each coordinate turns by about this much, in radians, at the first step; then less
RATE = 0.02
# of the products at a cheap step
SHARE = 0.5
# multiplications that steps on samples and on the whole model may take, and how many steps that
# may be
WORK, LEAST_STEPS, MOST_STEPS = 3e12, 30, 200
WHOLE_WORK, LEAST_WHOLE_STEPS, MOST_WHOLE_STEPS = 1.2e13, 10, 100


@final
@dataclass(frozen=True, slots=True)
class Learned(Chooser):
    """Turns every folded rotation of the plan further, by gradients."""

    name: str = "learned"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        prepared = prepare(task)
        if isinstance(prepared, str):
            return task.plan, (Note(False, self.name, prepared),)
        trial, products = prepared
        best = Best(trial, Holdout(task))
        _by_products(products, task, best)
        clips = products.clips
        # its samples are large
        del products, prepared
        _by_outputs(trial, clips, task, best)
        return best.taken(task.plan, self.name, "rotations learned")


def _by_products(products: Products, task: Task, best: Best) -> None:
    generator = torch.Generator(device="cpu").manual_seed(task.plan.recipe.seed)

    def loss(matrices: Sequence[Tensor], _at: int) -> Tensor:
        return products.loss(matrices, generator, SHARE)

    steps = affordable(WORK, products.work(SHARE), LEAST_STEPS, MOST_STEPS)
    learn(best, loss, steps, RATE, lambda at, of: task.advance("learn on samples", at, of))


def _by_outputs(trial: Trial, clips: Mapping[str, float], task: Task, best: Best) -> None:
    learning, _ = split(task.batches)
    whole = Whole(trial, task.program, learning, clips)
    generator = torch.Generator(device="cpu").manual_seed(task.plan.recipe.seed)
    order: list[int] = []

    def loss(matrices: Sequence[Tensor], _at: int) -> Tensor:
        if not order:
            order.extend(torch.randperm(len(learning), generator=generator).tolist())
        return whole.loss(matrices, order.pop())

    steps = affordable(WHOLE_WORK, whole.work(), LEAST_WHOLE_STEPS, MOST_WHOLE_STEPS)
    learn(best, loss, steps, RATE, lambda at, of: task.advance("learn rotations", at, of))


CHOOSERS.add(Learned())
