"""The clips that activations of few bits will have, found before anything is learned under them.

Rotations learned for whole ranges would even out extremes that are cut off afterwards.
"""

from __future__ import annotations

from dataclasses import replace

from qpass.calibrate import Calibration, with_ranges
from qpass.ir import Program
from qpass.plan import Plan
from qpass.plan.chooser import Task


def with_clips(task: Task, after: Program) -> Plan:
    """The plan of `task` with the clips that one batch asks for in `after`, the program after it.

    Static scales stay open: they would not move with what is learned.
    """
    plan = task.plan
    dynamic = [q for q in plan.quantized if q.activation is not None and q.activation.dynamic]
    asked = replace(plan, quantized=tuple(dynamic), recipe=replace(plan.recipe, weigh_tokens=False))
    found, _ = with_ranges(after, asked, Calibration(task.batches[:1], [None]))
    known = {entry.site: entry for entry in found.quantized}
    return replace(plan, quantized=tuple(known.get(q.site, q) for q in plan.quantized))
