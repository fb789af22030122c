"""Learned rotations: every folded rotation is turned further, to where quantizing costs least.

All free regions are learned at once (Liu et al., SpinQuant: LLM quantization with learned
rotations, 2024), on the group itself. The loss is what the errors of products cost the outputs, on
samples, which needs no whole run (in the spirit of Akhondzadeh et al., KurTail: Kurtosis-based LLM
Quantization, 2025). The outputs decide, on calibration data that nothing was learned from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.search.holdout import Holdout
from qpass.search.orthogonal import Learner
from qpass.search.products import Products, prepare
from qpass.search.regions import Turning
from qpass.search.trial import Trial

# each coordinate turns by about this much, in radians, at the first step; then less
RATE = 0.015
# multiplications that learning may take, and how many steps that may be
WORK, LEAST_STEPS, MOST_STEPS = 1e13, 30, 200
# how often the held-out data is looked at
LOOKS = 3


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
        turning = trial.turning
        best = Best(trial, Holdout(task))
        start = [torch.eye(n).repeat(h, 1, 1) for h, n in turning.shapes]
        best.offer(start)
        first = best.score
        _learn_from_products(products, turning, task, best)
        if best.matrices is start:
            return task.plan, (Note(False, self.name, "the start is best on held-out data"),)
        why = f"held-out error {first:.4g} becomes {best.score:.4g}"
        return turning.plan(task.plan, best.matrices), (Note(True, self.name, why),)


@final
class Best:
    """The best matrices so far, on data that nothing was learned from."""

    def __init__(self, trial: Trial, holdout: Holdout) -> None:
        self._trial, self._holdout = trial, holdout
        self.matrices: list[Tensor] = []
        self.score = math.inf

    def offer(self, matrices: list[Tensor]) -> bool:
        """Keep these if they are better; whether they are."""
        score = self._trial.score(matrices, self._holdout.batches, self._holdout.wanted)
        # a comparison with NaN is false; the first are kept whatever they are
        if self.matrices and not score < self.score:
            return False
        self.matrices, self.score = matrices, score
        return True


def _learn_from_products(products: Products, turning: Turning, task: Task, best: Best) -> None:
    generator = torch.Generator(device="cpu").manual_seed(task.plan.recipe.seed)
    learner = Learner(turning.shapes, turning.lifted)
    share = 0.5
    steps = round(min(MOST_STEPS, max(LEAST_STEPS, WORK / max(1.0, products.work(share)))))
    for at in range(steps):
        task.advance("learn rotations", at, steps)
        rate = RATE * 0.5 * (1 + math.cos(math.pi * at / steps))
        learner.step(products.loss(learner.matrices, generator, share), rate)
        if (at + 1) % -(-steps // LOOKS) == 0 or at == steps - 1:
            best.offer(learner.values())
    task.advance("learn rotations", steps, steps)


CHOOSERS.add(Learned())
