"""Do the public calls do what they say, on models of different kinds?"""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import nn

import qpass
from qpass.rotations import Group
from tests.zoo import specimen

# float32 rounding through two layers, relative to the largest logit
EAGER_LIMIT = 1e-5

MODELS = ("llama_tied", "gpt2")


@pytest.mark.parametrize("name", MODELS)
def test_rotate_keeps_the_function(name: str) -> None:
    chosen = specimen(name)
    model, inputs = chosen.build(0).float(), chosen.inputs()
    want = model(**inputs).logits.detach()
    report = qpass.rotate(model, inputs)
    got = model(**inputs).logits
    assert report.max_error <= 1e-9
    assert report.eager_error <= EAGER_LIMIT
    assert (got - want).abs().max() <= EAGER_LIMIT * want.abs().max()
    assert len(report.plan.rotated) == 3
    assert len(report.plan.online) == 2


def test_inspect_changes_nothing_and_explains_everything() -> None:
    chosen = specimen("llama_tied")
    model, inputs = chosen.build(0).float(), chosen.inputs()
    before = copy.deepcopy(model.state_dict())
    found = qpass.inspect(model, inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # the stream turns; values, planes and the gated width change in each of two layers
    kinds = collections.Counter(r.group for r in found.regions if r.free)
    assert kinds[Group.ORTHOGONAL] == 1
    assert kinds[Group.GENERAL] == kinds[Group.ROPE_PLANES] == kinds[Group.DIAGONAL] == 2
    assert kinds[Group.PERMUTATION] == 6
    assert all(r.group is Group.GENERAL or r.bounds for r in found.regions)
    assert {p.input for p in found.products} == {"folded", "online"}
    assert all(r.free or r.pins[0].why for r in found.regions)
    assert "mlp.down_proj.weight" in str(found)
    assert "not invertible matrices: the root mean square must not change (aten.rms_norm" in str(
        found
    )


@pytest.mark.parametrize("recipe", ["w8a8", "w8a16", "w4a8", "w4a16-g64", "auto"])
def test_quantize_stays_close(recipe: str) -> None:
    chosen = specimen("llama_tied")
    model, inputs = chosen.build(0).float(), chosen.inputs()
    want = model(**inputs).logits.detach()
    assert qpass.quantize(model, recipe, inputs=inputs) is model
    got = model(**inputs).logits
    error = (got - want).norm() / want.norm()
    # which format `auto` is depends on the machine
    assert 0 < error < (0.06 if recipe.startswith("w8") else 0.6)


def test_auto_is_no_worse_than_either_choice() -> None:
    chosen = specimen("llama_tied")
    inputs = chosen.inputs()
    errors = {}
    for rotation in ("on", "off", "auto"):
        model = chosen.build(0).float()
        want = model(**inputs).logits.detach()
        recipe = qpass.Recipe.read("w4a4", rotation=rotation)
        got = qpass.quantize(model, recipe, inputs=inputs)(**inputs).logits
        errors[rotation] = float((got - want).norm())
    assert errors["auto"] <= 1.1 * min(errors["on"], errors["off"])


def test_a_model_that_does_not_say_what_it_takes() -> None:
    with pytest.raises(qpass.QpassError, match="inputs are needed"):
        qpass.inspect(nn.Linear(3, 2))


def test_inputs_are_made_for_transformers_models() -> None:
    found = qpass.inspect(specimen("llama_tied").build(0).float())
    assert any(r.free for r in found.regions)


def test_an_unknown_recipe_names_the_nearest() -> None:
    chosen = specimen("llama_tied")
    with pytest.raises(qpass.QpassError, match="w8a8"):
        qpass.quantize(chosen.build(0), "w8a9", inputs=chosen.inputs())
