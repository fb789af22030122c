"""Tasks for choosers: tiny models of the zoo with a few random batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpass.capture import capture
from qpass.ir import run_passes
from qpass.plan import Plan, Recipe
from qpass.plan.choose import choose
from qpass.plan.chooser import Task
from qpass.search.clips import with_clips
from qpass.search.holdout import Holdout
from qpass.transform import FoldNorms, FoldScales, carry_out
from tests.zoo import specimen, tokens

W4A4 = {
    "weight": {"format": "int4"},
    "activation": {"format": "int4", "dynamic": True},
    "head": "float",
    "embedding": "float",
}


def task(name: str, recipe: Mapping[str, object] = W4A4, batches: int = 6, seed: int = 0) -> Task:
    """A model of the zoo in float32, the plan that needs no data, and data."""
    given = specimen(name).inputs()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
    data = [batch(inputs, i) for i in range(batches)]
    return task_of(specimen(name).build(0).float(), inputs, {**recipe, "seed": seed}, data)


def task_of(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    recipe: Mapping[str, object],
    data: Sequence[Mapping[str, Tensor]],
) -> Task:
    """A model, the plan that needs no data, and data."""
    captured = capture(model, inputs)
    folded, _ = run_passes(captured.program, [FoldNorms(), FoldScales()])
    plan = choose(folded, Recipe.read(recipe), stored=True)
    return Task(captured.program, folded, plan, [captured.flatten(given) for given in data])


def batch(inputs: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random inputs of the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else tokens(*value.shape, seed=seed)
        for name, value in inputs.items()
    }


def score_under_clips(given: Task, plan: Plan) -> float:
    """How far a plan is from the float outputs, under the clips that suit the start."""
    start = with_clips(given, carry_out(given.program, given.folded, given.plan).program)
    return Holdout(given).score(replace(plan, quantized=start.quantized))


def without_rotations(given: Task) -> Task:
    """The same task, with a plan that folds nothing."""
    return replace(given, plan=replace(given.plan, rotated=()))
