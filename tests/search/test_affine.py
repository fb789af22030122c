"""Are invertible matrices exact, dominated by their diagonals, and only kept where they help?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qpass.analyze import find_regions
from qpass.plan.chooser import CHOOSERS, Task
from qpass.rotations import Group
from qpass.search import affine
from qpass.search.holdout import Holdout
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, task, task_of
from tests.zoo import randomise

EXACT = 1e-9
UNROTATED = W4A4 | {"rotation": "off"}


def linear(recipe: dict[str, object] = UNROTATED) -> Task:
    """Two products in a row, between which values are correlated and of different sizes."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 24)).eval()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixed = torch.eye(32) + 0.7 * torch.randn(32, 32, generator=generator) / 32**0.5
        mixed[:, [3, 17]] *= 20
        model[0].weight.copy_(mixed.T @ model[0].weight)
        model[1].weight.copy_(model[1].weight @ torch.linalg.inv(mixed).T)
    data = torch.randn(8, 64, 16, generator=generator)
    return task_of(model, {"input": data[0]}, recipe, [{"input": x} for x in data])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vision", "nano_gpt"])
@pytest.mark.parametrize("recipe", [UNROTATED, W4A4], ids=["unrotated", "rotated"])
def test_they_are_exact_and_no_worse(name: str, recipe: dict[str, object]) -> None:
    given = task(name, recipe)
    plan, notes = CHOOSERS["affine"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert done.plan.changed == plan.changed
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert replace(plan, changed=()) == given.plan
    assert bool(plan.changed) is notes[0].done
    holdout = Holdout(given)
    assert holdout.score(plan) <= holdout.score(given.plan)


def test_what_was_mixed_is_taken_apart() -> None:
    given = linear()
    plan, notes = CHOOSERS["affine"].choose(given)
    assert notes[0].done, notes
    (changed,) = plan.changed
    assert changed.group is Group.GENERAL
    holdout = Holdout(given)
    assert holdout.score(plan) < 0.7 * holdout.score(given.plan)


def test_rows_are_dominated() -> None:
    (changed,) = CHOOSERS["affine"].choose(linear())[0].changed
    matrix = changed.element.given()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    others = matrix.abs().sum(-1) - diagonal
    assert (diagonal > 0).all()
    assert (others <= affine.DOMINATED * diagonal * (1 + 1e-6)).all()
    # and there are others
    assert others.max() > 0.01


def test_attention_has_one_matrix_for_each_head() -> None:
    for seed in range(12):
        given = task("llama", UNROTATED, seed=seed)
        plan, _ = CHOOSERS["affine"].choose(given)
        if plan.changed:
            assert {c.element.heads for c in plan.changed} == {2}
            regions = find_regions(given.folded, Group.GENERAL)
            assert {c.region for c in plan.changed} <= {r.name for r in regions if r.free}
            return
    pytest.fail("no head was ever changed")


def test_equal_tasks_give_equal_matrices() -> None:
    first, second = (CHOOSERS["affine"].choose(linear()) for _ in "ab")
    assert first == second
    assert first[0].elements


def test_what_has_scales_keeps_them() -> None:
    given = linear()
    scaled, notes = CHOOSERS["smooth"].choose(given)
    assert notes[0].done, notes
    plan, (note,) = CHOOSERS["affine"].choose(replace(given, plan=scaled))
    assert plan == scaled
    assert not note.done


def test_nothing_is_rounded() -> None:
    given = task("llama", {k: v for k, v in W4A4.items() if k not in ("weight", "activation")})
    assert CHOOSERS["affine"].choose(given)[0] == given.plan
