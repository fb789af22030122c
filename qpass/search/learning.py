"""How transforms are learned: steps against a gradient, and the best that were seen on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from qpass.ir import Note
from qpass.plan import Plan
from qpass.search.holdout import Holdout
from qpass.search.orthogonal import Learner
from qpass.search.trial import Trial

# how often held-out data is looked at while something is learned
LOOKS = 4
# of the steps, those that grow: the first gradients are mostly noise
WARM = 0.2

# what a step costs under matrices, by its number
Loss = Callable[[Sequence[Tensor], int], Tensor]
# is told how many steps are done, of how many
Advance = Callable[[int, int], None]


@final
class Best:
    """The best matrices so far, by what rounding really does to data that nothing is learned from.

    Those that change nothing are the first.
    """

    def __init__(self, trial: Trial, holdout: Holdout) -> None:
        self._trial, self._holdout = trial, holdout
        self.matrices: list[Tensor] = [
            torch.eye(n, device="cpu").repeat(h, 1, 1) for h, n in trial.turning.shapes
        ]
        if trial.scaling is not None:
            self.matrices += trial.scaling.start()
        self.score = self.first = self._judged(self.matrices)
        self.found = False

    def offer(self, matrices: list[Tensor]) -> None:
        """Keep these if they are better."""
        score = self._judged(matrices)
        # a comparison with NaN is false; what is not a number is no reason to stay at one
        if score < self.score or (math.isnan(self.score) and not math.isnan(score)):
            self.matrices, self.score, self.found = matrices, score, True

    def taken(self, plan: Plan, name: str, done: str) -> tuple[Plan, tuple[Note, ...]]:
        """The plan with the best matrices, and what they gained on held-out data."""
        if not self.found:
            return plan, (
                Note(False, name, f"the start is best on held-out data: {self.first:.4g}"),
            )
        why = f"{done}: held-out error {self.first:.4g} becomes {self.score:.4g}"
        turning, scaling = self._trial.turning, self._trial.scaling
        count = len(turning.stacks)
        found = turning.plan(plan, self.matrices[:count])
        if scaling is not None:
            found = scaling.plan(found, self.matrices[count:])
        return found, (Note(True, name, why),)

    def learner(self) -> Learner:
        """What goes on from the best."""
        turning = self._trial.turning
        count = len(turning.stacks)
        matrices, logs = self.matrices[:count], self.matrices[count:]
        return Learner(turning.shapes, turning.lifted, matrices, logs)

    def _judged(self, matrices: list[Tensor]) -> float:
        return self._trial.score(matrices, self._holdout.batches, self._holdout.wanted)


def learn(best: Best, loss: Loss, steps: int, rate: float, advance: Advance) -> None:
    """Go on from the best with steps that grow and shrink again; offer where they lead."""
    learner = best.learner()
    for at in range(steps):
        advance(at, steps)
        grown = min(1.0, (at + 1) / (WARM * steps))
        now = rate * grown * 0.5 * (1 + math.cos(math.pi * at / steps))
        learner.step(loss([*learner.matrices, *learner.numbers], at), now)
        if (at + 1) % -(-steps // LOOKS) == 0 or at == steps - 1:
            best.offer(learner.values())
    advance(steps, steps)


def affordable(work: float, of_one: float, least: int, most: int) -> int:
    """How many steps some work is enough for, within bounds."""
    return round(min(most, max(least, work / max(1.0, of_one))))
