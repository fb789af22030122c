"""How transforms are learned: steps against a gradient, and the best that were seen on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from qpass.search.holdout import Holdout
from qpass.search.orthogonal import Learner
from qpass.search.trial import Trial

# how often held-out data is looked at while something is learned
LOOKS = 3

# what a step costs, by its number
Loss = Callable[[Sequence[Tensor], int], Tensor]
# is told how many steps are done, of how many
Advance = Callable[[int, int], None]


@final
class Best:
    """The best matrices so far, on data that nothing was learned from."""

    def __init__(self, trial: Trial, holdout: Holdout) -> None:
        self._trial, self._holdout = trial, holdout
        self.matrices: list[Tensor] = [
            torch.eye(n, device="cpu").repeat(h, 1, 1) for h, n in trial.turning.shapes
        ]
        self.score = self.first = self._scored(self.matrices)
        self.found = False

    def offer(self, matrices: list[Tensor]) -> None:
        """Keep these if they are better."""
        score = self._scored(matrices)
        # a comparison with NaN is false; what is not a number is no reason to stay at one
        if score < self.score or (math.isnan(self.score) and not math.isnan(score)):
            self.matrices, self.score, self.found = matrices, score, True

    def _scored(self, matrices: list[Tensor]) -> float:
        return self._trial.score(matrices, self._holdout.batches, self._holdout.wanted)


def learn(best: Best, trial: Trial, loss: Loss, steps: int, rate: float, advance: Advance) -> None:
    """Go on from the best with steps that become smaller, and offer where they lead."""
    learner = Learner(trial.turning.shapes, trial.turning.lifted, best.matrices)
    for at in range(steps):
        advance(at, steps)
        now = rate * 0.5 * (1 + math.cos(math.pi * at / steps))
        learner.step(loss(learner.matrices, at), now)
        if (at + 1) % -(-steps // LOOKS) == 0 or at == steps - 1:
            best.offer(learner.values())
    advance(steps, steps)
