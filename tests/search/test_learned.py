"""Are learned rotations exact, never worse than where they start, and the same twice?"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qpass.ir import Block, ChangeBasis
from qpass.plan.chooser import CHOOSERS
from qpass.rotations import Element, Transform
from qpass.search import whole
from qpass.search.regions import turned
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, score_under_clips, task, without_rotations

EXACT = 1e-10
MODELS = ("llama", "gpt2", "bert", "vision", "gpt_neox", "nano_gpt")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """As many as show that it learns."""
    monkeypatch.setattr(whole, "MOST_STEPS", 20)


@pytest.mark.parametrize("name", MODELS)
def test_learned_rotations_are_exact_and_no_worse(name: str) -> None:
    given = task(name)
    plan, notes = CHOOSERS["learned"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert done.plan.rotated == plan.rotated
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    start, found = (score_under_clips(given, p) for p in (given.plan, plan))
    if notes[0].done:
        assert any(isinstance(r.transform, Element) for r in plan.rotated)
        assert found < start
    else:
        assert plan == given.plan
    # what a chooser does not decide stays
    assert dataclasses.replace(plan, rotated=given.plan.rotated) == given.plan


def test_something_is_learned() -> None:
    given = task("llama")
    plan, notes = CHOOSERS["learned"].choose(given)
    assert notes[0].done
    assert score_under_clips(given, plan) < 0.97 * score_under_clips(given, given.plan)


def test_equal_tasks_give_equal_plans() -> None:
    first, second = (CHOOSERS["learned"].choose(task("llama"))[0] for _ in range(2))
    assert first == second
    assert first.elements
    other = CHOOSERS["learned"].choose(task("llama", seed=1))[0]
    assert other.elements != first.elements


def test_there_may_be_nothing_to_learn() -> None:
    given = task("llama")
    plan, notes = CHOOSERS["learned"].choose(without_rotations(given))
    assert plan.rotated == ()
    assert not notes[0].done
    floating = {k: v for k, v in W4A4.items() if k not in ("weight", "activation")}
    given = task("llama", floating)
    plan, notes = CHOOSERS["learned"].choose(given)
    assert plan == given.plan
    assert "nothing is rounded" in notes[0].why


def test_one_batch_serves_for_both() -> None:
    plan, _ = CHOOSERS["learned"].choose(task("llama", batches=1))
    assert plan.rotated


@pytest.mark.parametrize(
    "block",
    [Block.whole(12), Block(3, (2, 4), (4, 1), 0), Block(1, (3, 2), (1, 5)), Block(0, (4,), (3,))],
)
def test_a_value_turns_as_a_weight_does(block: Block) -> None:
    heads = 1 if block.head is None else block.sizes[block.head]
    basis = Transform("haar", block.width, heads=heads)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    for axis, value in ((1, weight), (0, weight.mT)):
        want = ChangeBasis(basis, axis, block).apply(value, {})
        got = turned(value, axis, block, basis.matrix())
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
