"""Are scales from data exact, of the right groups, and only kept where they help?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qpass.plan.chooser import CHOOSERS, Task
from qpass.search.holdout import Holdout
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, task, task_of
from tests.zoo import randomise

EXACT = 1e-9
MODELS = ("llama", "gpt2", "opt", "bert", "vision", "nano_gpt")
UNROTATED = W4A4 | {"rotation": "off"}


def outliers() -> Task:
    """Products with a few hidden channels between them that are much larger than the others."""
    model = nn.Sequential(
        nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 16)
    ).eval()
    randomise(model, 0)
    scale = torch.ones(48)
    scale[[3, 17]] = 50.0
    with torch.no_grad():
        model[0].weight.mul_(scale[:, None])
        model[0].bias.mul_(scale)
        model[2].weight.div_(scale)
    inputs = torch.randn(6, 64, 16, generator=torch.Generator().manual_seed(0))
    return task_of(model, {"input": inputs[0]}, UNROTATED, [{"input": x} for x in inputs])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "recipe"),
    [("smooth", UNROTATED), ("smooth", W4A4), ("migrate", UNROTATED), ("cross", UNROTATED)],
    ids=["unrotated", "rotated", "migrate", "cross"],
)
def test_scales_are_exact_and_no_worse(name: str, method: str, recipe: dict[str, object]) -> None:
    given = task(name, recipe)
    plan, notes = CHOOSERS[method].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert done.plan.changed == plan.changed
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert replace(plan, changed=()) == given.plan
    holdout = Holdout(given)
    assert bool(plan.changed) is notes[0].done
    assert holdout.score(plan) <= holdout.score(given.plan)
    assert all((c.element.given() > 0).all() for c in plan.changed)


@pytest.mark.parametrize("method", ["smooth", "migrate", "cross"])
def test_outliers_are_moved_away(method: str) -> None:
    given = outliers()
    plan, notes = CHOOSERS[method].choose(given)
    assert notes[0].done, notes
    (changed,) = plan.changed
    scales = changed.element.given()[0]
    # the large channels become smaller, against the others
    assert scales[[3, 17]].max() < 0.3 * scales.median()
    holdout = Holdout(given)
    assert holdout.score(plan) < 0.5 * holdout.score(given.plan)


def test_equal_tasks_give_equal_scales() -> None:
    first, second = (CHOOSERS["smooth"].choose(outliers()) for _ in "ab")
    assert first == second
    assert first[0].elements


def test_a_product_of_one_scale_for_all_is_left() -> None:
    # its rows would lose where others gain
    given = outliers()
    spec = replace(given.plan.quantized[0].weight, block="tensor")
    quantized = tuple(replace(q, weight=spec) for q in given.plan.quantized)
    given = replace(given, plan=replace(given.plan, quantized=quantized))
    assert CHOOSERS["smooth"].choose(given)[0].changed == ()
