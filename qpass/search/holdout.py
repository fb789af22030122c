"""Calibration data that is kept apart, and what a plan does to the outputs there.

Choices among many are made on it, so each chooser asks it a few times only (Dwork et al.,
Preserving Statistical Validity in Adaptive Data Analysis, 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import Task
from qpass.search.regions import Turning
from qpass.search.trial import Inputs, Trial, fresh
from qpass.transform import carry_out

# of the calibration data, and batches at most
SHARE, MOST = 0.25, 4


def split(batches: Sequence[Inputs]) -> tuple[Sequence[Inputs], Sequence[Inputs]]:
    """Data to learn from and data to choose by; one batch has to serve for both."""
    held = min(MOST, max(1, round(SHARE * len(batches))))
    return (batches[:-held], batches[-held:]) if len(batches) > 1 else (batches, batches)


@final
class Holdout:
    """The float outputs of held-out batches, which plans are compared with."""

    def __init__(self, task: Task) -> None:
        self._task = task
        _, self.batches = split(task.batches)
        self.wanted = [task.program.run(*fresh(inputs)) for inputs in self.batches]

    def score(self, plan: Plan) -> float:
        """How far the quantized outputs are from the float ones under a plan."""
        after = carry_out(self._task.program, self._task.folded, plan).program
        turning = Turning((), {})
        with torch.no_grad():
            return Trial(after, plan, turning).score([], self.batches, self.wanted)

    def better(self, plan: Plan, name: str, done: str) -> tuple[Plan, tuple[Note, ...]]:
        """The plan, if it does better than that of the task, which is returned otherwise."""
        if plan == self._task.plan:
            return plan, (Note(False, name, "nothing was found that lowers the errors"),)
        before, after = self.score(self._task.plan), self.score(plan)
        if not after < before:
            why = f"the start is best on held-out data: {before:.4g}, not {after:.4g}"
            return self._task.plan, (Note(False, name, why),)
        return plan, (Note(True, name, f"{done}: held-out error {before:.4g} becomes {after:.4g}"),)
