"""Do tails become lighter, exactly, and only where that helps?"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qpass.plan.chooser import CHOOSERS
from qpass.search import kurtail
from qpass.search.holdout import Holdout
from qpass.search.kurtail import _inputs, _tails, kurtosis
from qpass.search.learning import Best
from qpass.search.products import prepare
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, task, without_rotations

EXACT = 1e-10


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """As many as show that it learns."""
    monkeypatch.setattr(kurtail, "STEPS", 40)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vision"])
def test_what_is_found_is_exact_and_no_worse(name: str) -> None:
    given = task(name)
    plan, notes = CHOOSERS["kurtail"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert done.plan.rotated == plan.rotated
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert dataclasses.replace(plan, rotated=given.plan.rotated) == given.plan
    assert (plan != given.plan) is notes[0].done
    assert Holdout(given).score(plan) <= Holdout(given).score(given.plan)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tails_become_lighter(name: str, monkeypatch) -> None:
    given = task(name)
    seen: list[list[torch.Tensor]] = []
    monkeypatch.setattr(Best, "offer", lambda _, matrices: seen.append(matrices))
    CHOOSERS["kurtail"].choose(given)
    trial, products = prepare(given)
    start = [torch.eye(n).repeat(h, 1, 1) for h, n in trial.turning.shapes]

    def tails(matrices: list[torch.Tensor]) -> float:
        generator = torch.Generator().manual_seed(1)
        return sum(float(_tails(one, matrices, generator)) for one in _inputs(products))

    assert tails(seen[-1]) < 0.9 * tails(start)


def test_what_is_not_quantized_has_no_tails() -> None:
    given = task("llama", {k: v for k, v in W4A4.items() if k != "activation"})
    plan, notes = CHOOSERS["kurtail"].choose(given)
    assert plan == given.plan
    assert "while the model runs" in notes[0].why
    assert CHOOSERS["kurtail"].choose(without_rotations(task("llama")))[0].rotated == ()


def test_known_kurtoses() -> None:
    even = torch.linspace(-1, 1, 10001)
    normal = torch.randn(100000, generator=torch.Generator().manual_seed(0))
    assert abs(float(kurtosis(even[None])) - 1.8) < 1e-2
    assert abs(float(kurtosis(normal[None])) - 3) < 0.1
    assert float(kurtosis(torch.zeros(1, 4))) == 0
