"""Learned rotations: every folded rotation is turned further, to where quantizing costs least.

All free regions are learned at once, on the group itself, by the gradients of the whole quantized
model (Liu et al., SpinQuant: LLM quantization with learned rotations, 2024). Its loss is the
divergence from the float model. The outputs decide, on calibration data that nothing was learned
from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.search.clips import with_clips
from qpass.search.regions import Turning
from qpass.search.trial import Trial
from qpass.search.whole import learn_whole
from qpass.transform import carry_out


@final
@dataclass(frozen=True, slots=True)
class Learned(Chooser):
    """Turns every folded rotation of the plan further, by gradients."""

    name: str = "learned"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        if not task.plan.quantized:
            return task.plan, (Note(False, self.name, "nothing is rounded"),)
        after = carry_out(task.program, task.folded, task.plan).program
        turning = Turning.of(task.folded, after, task.plan)
        if not turning.stacks:
            return task.plan, (Note(False, self.name, "nothing that is folded can turn"),)
        best = learn_whole(task, Trial(after, with_clips(task, after), turning))
        return best.taken(task.plan, self.name, "rotations learned")


CHOOSERS.add(Learned())
