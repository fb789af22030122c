"""Are invertible transforms of inputs exact, learned, and only put where they help?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import qpass
from qpass.plan.chooser import CHOOSERS, Task
from qpass.rotations import Kronecker
from qpass.search.flat import whole_order
from qpass.search.holdout import Holdout
from qpass.targets.record import record_of
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, task, task_of
from tests.zoo import randomise, specimen, tokens

EXACT = 1e-9
NVFP4 = {"recipe": "nvfp4", "rotation": "off", "head": "float", "embedding": "float"}
UNROTATED = W4A4 | {"rotation": "off"}
W4 = {
    "weight": {"format": "int4"},
    "rotation": "off",
    "head": "float",
    "embedding": "float",
}


def correlated(recipe: dict[str, object]) -> Task:
    """A product that reads values of which most lie near a plane, with an outlier channel."""
    model = nn.Sequential(
        nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 8)
    )
    model = model.eval()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[0].weight.copy_(
            torch.randn(48, 2, generator=generator) @ torch.randn(2, 16, generator=generator) / 4
            + 0.02 * torch.randn(48, 16, generator=generator)
        )
        model[2].weight[:, 7] *= 20
    data = torch.randn(8, 64, 16, generator=generator)
    return task_of(model, {"input": data[0]}, recipe, [{"input": x} for x in data])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vision", "nano_gpt"])
def test_they_are_exact_and_no_worse(name: str) -> None:
    given = task(name)
    plan, notes = CHOOSERS["flat"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert done.plan.online == plan.online
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert replace(plan, online=given.plan.online) == given.plan
    assert (plan != given.plan) is notes[0].done
    holdout = Holdout(given)
    assert holdout.score(plan) <= holdout.score(given.plan)


@pytest.mark.parametrize(
    ("recipe", "share"),
    [(UNROTATED, 0.8), (W4, 0.8), (NVFP4, 0.95)],
    ids=["w4a4", "w4a16", "nvfp4"],
)
def test_it_gains_where_there_is_something_to_gain(recipe: dict[str, object], share: float) -> None:
    given = correlated(recipe)
    plan, notes = CHOOSERS["flat"].choose(given)
    assert notes[0].done, notes
    holdout = Holdout(given)
    assert holdout.score(plan) < share * holdout.score(given.plan)
    (made,) = (o.transform for o in plan.online if o.site == "2.weight")
    assert isinstance(made, Kronecker)
    # scales of a block are not mixed with those of others
    assert (made.order * made.power == 16) is (recipe is NVFP4)


def test_equal_tasks_give_equal_transforms() -> None:
    first, second = (CHOOSERS["flat"].choose(correlated(UNROTATED)) for _ in "ab")
    assert first == second
    assert first[0].elements


def test_products_of_one_value_share_their_transform() -> None:
    for seed in range(3):
        plan, notes = CHOOSERS["flat"].choose(task("llama", seed=seed))
        made = {o.site: o.transform for o in plan.online if isinstance(o.transform, Kronecker)}
        shared = [
            s for s in made if s.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        ]
        if notes[0].done and shared:
            layers = {s.rsplit(".", 2)[0] for s in shared}
            assert len(shared) == 3 * len(layers)
            assert len({made[s] for s in shared}) == len(layers)
            return
    pytest.fail("no input of attention was ever flattened")


def test_a_model_is_quantized_with_what_is_learned(tmp_path) -> None:
    batches = [{"input_ids": tokens(seed=seed)} for seed in range(4)]
    for seed in range(4):
        recipe = W4A4 | {"transform": "flat", "rounding": "nearest", "seed": seed}
        model = qpass.quantize(specimen("llama").build(0).float(), recipe, calibration=batches)
        (plan,) = record_of(model).plans
        if plan.elements:
            qpass.save(model, tmp_path / "saved")
            loaded = qpass.load(tmp_path / "saved")
            assert torch.equal(loaded(**batches[1]).logits, model(**batches[1]).logits)
            return
    pytest.fail("nothing was ever learned")


@pytest.mark.parametrize(
    ("width", "order"),
    [
        (576, 36),
        (1536, 48),
        (48, 12),
        (64, 8),
        (4096, 64),
        (11008, 172),
        (7, 7),
        (1, None),
        (9241, None),
    ],
)
def test_factors_are_about_the_root(width: int, order: int | None) -> None:
    assert whole_order(width) == order


def test_nothing_is_rounded() -> None:
    given = task("llama", {k: v for k, v in W4A4.items() if k not in ("weight", "activation")})
    assert CHOOSERS["flat"].choose(given)[0] == given.plan
