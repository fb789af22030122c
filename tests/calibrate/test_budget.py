"""Does the cost of each site say what quantizing it alone does, and do predictions follow it?"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import BadInput
from qpass.targets.layers import QuantizedLinear
from qpass.verify import Budget, evaluate
from tests import zoo

NAMES = ("llama", "llama_tied", "gpt2", "gemma3", "bert", "vision", "nano_gpt")


def data(name: str, count: int = 4) -> list[Mapping[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return torch.randint(3, zoo.VOCABULARY, value.shape, generator=generator)

    inputs = zoo.specimen(name).inputs()
    return [{key: drawn(value) for key, value in inputs.items()} for _ in range(count)]


def budget_of(
    name: str, recipe: object, how: str = "measured"
) -> tuple[nn.Module, nn.Module, Budget]:
    model, batches = zoo.specimen(name).build(0).float(), data(name)
    changed = qpass.quantize(copy.deepcopy(model), recipe, inputs=batches[0], calibration=batches)
    budget = qpass.evaluate(changed, model, batches, budget=how).budget
    assert budget is not None
    return changed, model, budget


@pytest.mark.parametrize("name", NAMES)
def test_predictions_follow_what_is_measured(name: str) -> None:
    changed, model, budget = budget_of(name, "w4a8")
    assert len(budget.sites) == len([m for m in changed.modules() if hasattr(m, "canonical")])
    # the program with everything quantized is the model
    kl = evaluate(changed, model, data(name)).kl
    assert budget.whole.value == pytest.approx(kl.value, rel=1e-2)
    assert budget.measured is not None
    assert 0.5 < budget.measured.value / budget.whole.value < 2
    assert 0.5 < budget.predicted / budget.measured.value < 2
    pairs = torch.tensor([(s.predicted, s.measured.value) for s in budget.sites])
    assert (pairs > 0).all()
    # one draw of tokens for each of few windows
    assert float(torch.corrcoef(pairs.log().T)[0, 1]) > 0.8


def test_roundings_from_data_are_predicted_by_what_they_lose() -> None:
    _, _, budget = budget_of("llama", {"recipe": "w4a16-g64", "weight": {"block": 16}})
    assert budget.measured is not None
    assert 0.4 < budget.predicted / budget.measured.value < 2.5


def test_a_site_that_loses_more_costs_more() -> None:
    changed, model, before = budget_of("llama", "w8a16", "predicted")
    assert before.measured is None
    assert all(site.measured is None for site in before.sites)
    path = "model.layers.0.mlp.down_proj"
    layer = changed.get_submodule(path)
    assert isinstance(layer, QuantizedLinear)
    layer.row_scales.mul_(1.1)
    after = qpass.evaluate(changed, model, data("llama"), budget="predicted").budget
    assert after is not None
    for old, new in zip(before.sites, after.sites, strict=True):
        if new.site == f"{path}.weight":
            assert new.error == pytest.approx(0.01, rel=0.1)
            assert new.predicted > 100 * old.predicted
        else:
            assert new == old
    assert after.whole.value > before.whole.value


def test_padding_costs_nothing() -> None:
    model = zoo.specimen("llama").build(0).float()
    ids = torch.randint(3, zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    plain = [{"input_ids": ids, "attention_mask": mask}]
    changed = qpass.quantize(copy.deepcopy(model), "w4a8", inputs=plain[0])
    longer = torch.nn.functional.pad(ids, (0, 5))
    padded = [{"input_ids": longer, "attention_mask": torch.nn.functional.pad(mask, (0, 5))}]
    want = qpass.evaluate(changed, model, plain, budget="measured").budget
    got = qpass.evaluate(changed, model, padded, budget="measured").budget
    assert want is not None
    assert got is not None
    for one, other in zip(got.sites, want.sites, strict=True):
        assert one.error == pytest.approx(other.error, rel=1e-3)
        assert one.measured.value == pytest.approx(other.measured.value, rel=1e-2, abs=1e-7)


def test_a_rotated_model_is_a_reference_too() -> None:
    model, batches = zoo.specimen("llama").build(0).float(), data("llama")
    qpass.rotate(model, batches[0])
    changed = qpass.quantize(
        copy.deepcopy(model), {"recipe": "w8a16", "rotation": "off"}, inputs=batches[0]
    )
    found = qpass.evaluate(changed, model, batches, budget="measured")
    assert found.budget is not None
    assert found.budget.whole.value == pytest.approx(found.kl.value, rel=1e-2, abs=1e-6)


def test_what_has_no_budget_is_refused() -> None:
    model, batches = zoo.specimen("llama").build(0).float(), data("llama")
    changed = qpass.quantize(copy.deepcopy(model), "w8a16", inputs=batches[0])
    with pytest.raises(BadInput, match="not quantized"):
        qpass.evaluate(model, model, batches, budget="predicted")
    with pytest.raises(BadInput, match="not the float model"):
        qpass.evaluate(changed, changed, batches, budget="predicted")
    with pytest.raises(BadInput, match="budget"):
        qpass.evaluate(changed, model, batches, budget="all")
    with pytest.raises(BadInput, match="nothing to evaluate"):
        qpass.evaluate(changed, model, [], budget="predicted")
