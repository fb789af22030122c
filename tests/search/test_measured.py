"""Does each region turn where that lowers errors, and only there?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import qpass
from qpass.plan.chooser import CHOOSERS, Task
from qpass.rotations import Transform
from qpass.search.holdout import Holdout
from qpass.targets.record import record_of
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, task, task_of
from tests.zoo import randomise

EXACT = 1e-9
NVFP4 = {"recipe": "nvfp4", "rotation": "on", "head": "float", "embedding": "float"}
W4 = {"weight": {"format": "int4"}, "head": "float", "embedding": "float"}


def apart() -> tuple[nn.Module, torch.Tensor]:
    """Two places that can turn: weights with outliers, and weights that lie on their grid."""
    model = nn.Sequential(
        nn.Linear(16, 32),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.Linear(32, 16),
        nn.Tanh(),
        nn.Linear(16, 16),
    ).eval()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[1].weight[:, 5] *= 30
        for gridded in (model[3], model[4]):
            codes = torch.randint(-8, 8, gridded.weight.shape, generator=generator)
            codes[:, 0] = -8
            gridded.weight.copy_(codes / 16)
    return model, torch.randn(6, 64, 16, generator=generator)


def apart_task() -> Task:
    model, data = apart()
    return task_of(model, {"input": data[0]}, W4, [{"input": x} for x in data])


@pytest.mark.parametrize("name", ["llama", "gpt2", "vision", "bert"])
@pytest.mark.parametrize("recipe", [W4A4, NVFP4], ids=["int4", "nvfp4"])
def test_no_worse_than_on_or_off(name: str, recipe: dict[str, object]) -> None:
    given = task(name, recipe)
    plan, notes = CHOOSERS["measured"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert (done.plan.rotated, done.plan.online) == (plan.rotated, plan.online)
    assert (plan != given.plan) is notes[0].done
    holdout = Holdout(given)
    off = replace(given.plan, rotated=(), online=())
    assert holdout.score(plan) <= min(holdout.score(given.plan), holdout.score(off))


def test_each_place_by_itself() -> None:
    given = apart_task()
    assert len(given.plan.rotated) == 2
    plan, notes = CHOOSERS["measured"].choose(given)
    assert [r.region for r in plan.rotated] == ["0.weight[0:32]"], notes


def test_blocks_of_the_format_are_candidates() -> None:
    names: set[str] = set()
    for name in ("llama", "gpt2", "opt"):
        given = task(name, NVFP4)
        plan, _ = CHOOSERS["measured"].choose(given)
        every = [*(r.transform for r in plan.rotated), *(o.transform for o in plan.online)]
        names |= {t.rotation for t in every if isinstance(t, Transform)}
    assert "block_hadamard_16" in names


def test_equal_tasks_give_equal_plans() -> None:
    first, second = (CHOOSERS["measured"].choose(task("llama", NVFP4)) for _ in "ab")
    assert first == second


def test_nothing_turns_or_rounds() -> None:
    given = task("llama", {**W4A4, "rotation": "off"})
    plan, (note,) = CHOOSERS["measured"].choose(given)
    assert plan == given.plan
    assert 'rotation = "on"' in note.why
    given = task("llama", {k: v for k, v in W4A4.items() if k not in ("weight", "activation")})
    assert CHOOSERS["measured"].choose(given)[0] == given.plan


def test_data_decides_where_the_recipe_leaves_it_open() -> None:
    # what looks worse on one sample call may be better on data: nothing is dropped before
    model, data = apart()
    recipe = W4 | {"rotation": "auto", "transform": "measured", "rounding": "nearest"}
    qpass.quantize(model, recipe, calibration=list(data))
    (plan,) = record_of(model).plans
    assert [r.region for r in plan.rotated] == ["0.weight[0:32]"]


class Twice(nn.Module):
    """A layer that is called twice: what it reads and makes turns in both calls alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(16, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(self.layer(self.first(x))))


def test_a_layer_that_is_called_twice_turns_alike() -> None:
    model = Twice().eval()
    randomise(model, 0)
    data = torch.randn(6, 64, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.last.weight[:, 3] *= 50
    given = task_of(model, {"x": data[0]}, W4, [{"x": x} for x in data])
    assert len(given.plan.rotated) > 1
    plan, _ = CHOOSERS["measured"].choose(given)
    choices = {r.transform for r in plan.rotated}
    assert len(plan.rotated) in (0, len(given.plan.rotated))
    assert len(choices) <= 1
