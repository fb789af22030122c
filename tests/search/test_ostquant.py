"""Are rotations and scales that are learned together exact, no worse, and what was searched on?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qpass.plan.chooser import CHOOSERS
from qpass.search import whole
from qpass.search.holdout import Holdout
from qpass.search.learning import Best
from qpass.search.regions import Turning
from qpass.search.scaling import Scaling
from qpass.search.trial import Trial
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, score_under_clips, task

EXACT = 1e-9


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """As many as show that it learns."""
    monkeypatch.setattr(whole, "MOST_STEPS", 8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vision", "opt"])
def test_what_is_found_is_exact_and_no_worse(name: str) -> None:
    given = task(name)
    plan, notes = CHOOSERS["ostquant"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert (done.plan.rotated, done.plan.changed) == (plan.rotated, plan.changed)
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert replace(plan, rotated=given.plan.rotated, changed=()) == given.plan
    assert (plan != given.plan) is notes[0].done
    assert score_under_clips(given, plan) <= score_under_clips(given, given.plan)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_weights_move_as_the_plan_says(name: str) -> None:
    given = task(name)
    after = carry_out(given.program, given.folded, given.plan).program
    bare = carry_out(given.program, given.folded, replace(given.plan, online=())).program
    turning = Turning.of(given.folded, after, given.plan)
    scaling = Scaling.of(bare, after, given.plan)
    assert scaling.regions
    trial = Trial(after, given.plan, turning, scaling)
    best = Best(trial, Holdout(given))
    generator = torch.Generator().manual_seed(0)
    logs = [0.3 * torch.randn(x.shape, generator=generator) for x in scaling.start()]
    best.matrices, best.found = [*best.matrices[: len(turning.stacks)], *logs], True
    plan, _ = best.taken(given.plan, "ostquant", "")
    want = carry_out(given.program, given.folded, plan).program
    for use in scaling.sites:
        got = trial._moved(use, trial.base[use], best.matrices)
        exact = want.weights[use].evaluate(want.sources).float()
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)


def test_equal_tasks_give_equal_plans() -> None:
    first, second = (CHOOSERS["ostquant"].choose(task("llama")) for _ in "ab")
    assert first == second


def test_nothing_is_rounded() -> None:
    given = task("llama", {k: v for k, v in W4A4.items() if k not in ("weight", "activation")})
    plan, notes = CHOOSERS["ostquant"].choose(given)
    assert plan == given.plan
    assert "nothing is rounded" in notes[0].why
