"""Does a recipe's word on transforms from data reach the model, and is data asked for?"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import qpass
from qpass.errors import BadInput, UnknownName
from qpass.plan import Plan, Recipe
from qpass.plan.chooser import CHOOSERS
from qpass.rotations import Element
from qpass.search import whole
from qpass.targets.record import record_of
from tests.search.driver import W4A4
from tests.zoo import specimen, tokens

BATCHES = [{"input_ids": tokens(seed=seed)} for seed in range(4)]
LEARNED = W4A4 | {"transform": "learned", "rounding": "nearest"}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """As many as show that it learns."""
    monkeypatch.setattr(whole, "MOST_STEPS", 10)


def llama() -> torch.nn.Module:
    return specimen("llama").build(0).float()


def test_a_model_is_quantized_with_what_is_learned(tmp_path, caplog) -> None:
    with caplog.at_level("INFO", "qpass"):
        model = qpass.quantize(llama(), LEARNED, calibration=BATCHES)
    assert "held-out error" in caplog.text
    (plan,) = record_of(model).plans
    assert any(isinstance(r.transform, Element) for r in plan.rotated)
    # what was found is carried out again, without data
    plan.save(tmp_path / "plan.json")
    again = qpass.quantize(llama(), plan=tmp_path / "plan.json", inputs=BATCHES[0])
    assert torch.equal(again(**BATCHES[1]).logits, model(**BATCHES[1]).logits)
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved")
    assert torch.equal(loaded(**BATCHES[1]).logits, model(**BATCHES[1]).logits)


def test_methods_are_joined() -> None:
    recipe = LEARNED | {"transform": "learned+smooth"}
    model = qpass.quantize(llama(), recipe, calibration=BATCHES)
    (plan,) = record_of(model).plans
    assert plan.recipe.methods == ("learned", "smooth")
    assert Recipe.read(plan.recipe.table()) == plan.recipe
    assert Plan.read(plan.json()) == plan


def test_data_is_asked_for() -> None:
    with pytest.raises(BadInput, match="transform = 'learned': is found from data"):
        qpass.quantize(llama(), LEARNED, inputs=BATCHES[0])
    with pytest.raises(BadInput, match="is found from data"):
        qpass.rotate(llama(), BATCHES[0], LEARNED)
    compiled = torch.compile(llama(), backend="qpass", options={"recipe": LEARNED})
    with torch.no_grad(), pytest.raises(BadInput, match="is found from data"):
        compiled(**BATCHES[0])
    torch._dynamo.reset()


def test_unknown_methods() -> None:
    for name in ("lerned", "learned+lerned"):
        with pytest.raises(UnknownName, match="did you mean 'learned'"):
            Recipe.read("w8a8", transform=name)
    with pytest.raises(BadInput, match="transform = 3"):
        Recipe.read("w8a8", transform=3)


def test_every_method_has_its_file() -> None:
    for chooser in CHOOSERS:
        assert importlib.util.find_spec(f"qpass.search.{chooser.name}") is not None
