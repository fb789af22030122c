"""Rotations and scales learned together, by the gradients of the whole quantized model.

Hu et al., OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling
Transformations for Better Distribution Fitting, 2025. Rotations that are folded turn further and
every free region of positive diagonals is scaled, in front of what runs with the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.search.clips import with_clips
from qpass.search.regions import Turning
from qpass.search.scaling import Scaling
from qpass.search.trial import Trial
from qpass.search.whole import learn_whole
from qpass.transform import carry_out


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
        best = learn_whole(task, Trial(after, with_clips(task, after), turning, scaling))
        return best.taken(task.plan, self.name, f"{len(scaling.regions)} regions scaled")


CHOOSERS.add(OstQuant())
