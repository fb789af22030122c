"""Tasks for choosers: tiny models of the zoo with a few random batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qpass.capture import Captured, capture
from qpass.ir import run_passes
from qpass.plan import Recipe
from qpass.plan.choose import choose
from qpass.plan.chooser import Task
from qpass.transform import FoldNorms, FoldScales
from tests.zoo import specimen, tokens

W4A4 = {
    "weight": {"format": "int4"},
    "activation": {"format": "int4", "dynamic": True},
    "head": "float",
    "embedding": "float",
}


def task(name: str, recipe: Mapping[str, object] = W4A4, batches: int = 6, seed: int = 0) -> Task:
    """A model of the zoo in float32, the plan that needs no data, and data."""
    model = specimen(name).build(0).float()
    inputs = {
        k: v.float() if v.is_floating_point() else v for k, v in specimen(name).inputs().items()
    }
    captured = capture(model, inputs)
    folded, _ = run_passes(captured.program, [FoldNorms(), FoldScales()])
    plan = choose(folded, Recipe.read(recipe, seed=seed), stored=True)
    data = [batch(captured, inputs, i) for i in range(batches)]
    return Task(captured.program, folded, plan, data)


def batch(captured: Captured, inputs: Mapping[str, Tensor], seed: int) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else tokens(*value.shape, seed=seed)
        for name, value in inputs.items()
    }
    return captured.flatten(made)


def without_rotations(given: Task) -> Task:
    """The same task, with a plan that folds nothing."""
    return replace(given, plan=replace(given.plan, rotated=()))
