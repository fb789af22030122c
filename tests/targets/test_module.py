"""Does a module compute the same after rotation, and what its codes say after quantization?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from qpass.capture.export import capture
from qpass.errors import StateError, Unsupported
from qpass.formats import QuantizedTensor
from qpass.plan import Quantized, Recipe
from qpass.plan.choose import choose
from qpass.rounding import ROUNDINGS, round_parts
from qpass.targets.layers import QuantizedLinear, RotatedLinear
from qpass.targets.module import write_back
from qpass.targets.record import FORMAT_VERSION, record_of
from qpass.targets.replaceable import refusals
from qpass.targets.tables import QuantizedEmbedding
from tests.targets.driver import apply
from tests.zoo import NanoGPT, randomise, specimen, tokens

# norms of the models cast to float32 on the way, whatever the model's own type
EAGER = 1e-5
# 8-bit codes on both sides, two layers: measured 0.02 to 0.06; a wrong basis gives above 0.8
EIGHT_BITS = 0.12
# plain modules compute in float64 throughout
EXACT = 1e-12


def output(model: nn.Module, inputs) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def relative(want: Tensor, got: Tensor) -> float:
    return float((want.double() - got.double()).abs().max() / want.double().abs().max())


def nano(**changes) -> NanoGPT:
    model = NanoGPT().double().eval()
    randomise(model, 0)
    return model


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2", "vision"])
def test_rotation_keeps_the_function(name: str) -> None:
    entry = specimen(name)
    model, inputs = entry.build(0), entry.inputs()
    want = output(model, inputs)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    apply(model, inputs)
    assert relative(want, output(model, inputs)) <= EAGER
    after = model.state_dict()
    assert any(key not in after or not torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize(("name", "recipe"), [("llama_tied", "w8a8"), ("gpt2", "w8a16")])
def test_quantization_stays_close(name: str, recipe: str) -> None:
    entry = specimen(name)
    model, inputs = entry.build(0), entry.inputs()
    want = output(model, inputs)
    apply(model, inputs, recipe, rotation="on")
    assert 0 < relative(want, output(model, inputs)) <= EIGHT_BITS
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert any(layer.online is not None for layer in layers)
    assert all((layer.activation_bits == 8) is (recipe == "w8a8") for layer in layers)
    assert any(isinstance(m, QuantizedEmbedding) for m in model.modules())
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_is_stored_wider_than_it_is_computed(dtype: torch.dtype) -> None:
    model, inputs = nano().to(dtype), {"input_ids": tokens()}
    apply(model, inputs, "w8a16", rotation="on")
    held = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    # row scales and biases of bfloat16 layers are float32, as the sums that they meet
    assert held <= {dtype, torch.float32}


def test_rotating_twice_is_rotating() -> None:
    model, inputs = nano(), {"input_ids": tokens()}
    want = output(model, inputs)
    apply(model, inputs)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    apply(model, inputs, seed=1)
    assert relative(want, output(model, inputs)) <= EXACT
    assert len(record_of(model).plans) == 2
    assert not torch.equal(once["table.weight"], model.state_dict()["table.weight"])


def test_quantizing_after_rotating_equals_quantizing_at_once() -> None:
    inputs = {"input_ids": tokens()}
    model, other = nano(), nano()
    apply(model, inputs)
    apply(model, inputs, "w8a8", rotation="off")
    apply(other, inputs, "w8a8")
    # the parameters in between are float64, so the codes are the same
    assert torch.equal(output(model, inputs), output(other, inputs))


def test_quantizing_twice_is_refused() -> None:
    model, inputs = nano(), {"input_ids": tokens()}
    apply(model, inputs, "w8a8")
    before = output(model, inputs)
    with pytest.raises(StateError, match="quantized already"):
        apply(model, inputs, "w8a8")
    assert torch.equal(before, output(model, inputs))


def test_uses_that_differ_are_untied_and_others_stay_tied() -> None:
    inputs = {"input_ids": tokens()}
    model = nano()
    apply(model, inputs)
    assert record_of(model).untied
    assert model.head.weight is not model.table.weight
    kept = nano()
    apply(kept, inputs, rotation="off", keep_tied=True)
    assert kept.table.weight is not None


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, inputs = nano(), {"input_ids": tokens()}
    want, modules = output(model, inputs), dict(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def fails_late(entry: Quantized, parts_nk: Iterator[Tensor]) -> QuantizedTensor:
        if entry.site.startswith("head"):
            raise RuntimeError("planted")
        return round_parts(ROUNDINGS["nearest"], parts_nk, entry.weight, {})

    with pytest.raises(RuntimeError, match="planted"):
        apply(model, inputs, "w8a8", encode=fails_late)
    assert dict(model.named_modules()) == modules
    assert model.head.weight is model.table.weight
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(want, output(model, inputs))
    assert record_of(model).plans == ()


def test_a_failure_while_swapping_leaves_the_model_as_it_was(monkeypatch) -> None:
    model, inputs = nano(), {"input_ids": tokens()}
    want, modules = output(model, inputs), dict(model.named_modules())

    def refuse(self, flag=True):
        raise RuntimeError("planted")

    monkeypatch.setattr(NanoGPT, "requires_grad_", refuse)
    with pytest.raises(RuntimeError, match="planted"):
        apply(model, inputs, "w8a8")
    assert dict(model.named_modules()) == modules
    assert torch.equal(want, output(model, inputs))
    assert model.head.weight is model.table.weight


def test_rounding_of_parameters_is_reported() -> None:
    model = nano().bfloat16()
    notes = apply(model, {"input_ids": tokens()})
    [note] = [n for n in notes if n.where == "parameters"]
    assert "bfloat16" in note.why
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())


class Twice(nn.Module):
    """A product whose module does more, one that is called twice, and one that is functional."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.norm = nn.RMSNorm(12)
        self.more = Doubled(12, 20)
        self.back = nn.Linear(20, 12)
        self.loop = nn.Linear(12, 12)
        self.bare = nn.Parameter(torch.empty(12, 12))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.back(torch.relu(self.more(self.norm(x))))
        x = torch.tanh(self.loop(torch.tanh(self.loop(x))))
        return nn.functional.linear(x, self.bare)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_modules_that_do_more_are_left_alone() -> None:
    model = Twice().double().eval()
    randomise(model, 0)
    inputs = {"ids": torch.arange(8).reshape(2, 4)}
    want = output(model, inputs)
    rotated = copy.deepcopy(model)
    apply(rotated, inputs)
    assert relative(want, output(rotated, inputs)) <= EXACT
    assert isinstance(rotated.back, RotatedLinear)
    apply(model, inputs, "w8a8")
    assert type(model.more) is Doubled
    assert isinstance(model.bare, nn.Parameter)
    assert isinstance(model.loop, QuantizedLinear)
    assert isinstance(model.back, QuantizedLinear)
    assert relative(want, output(model, inputs)) <= EIGHT_BITS


def test_activations_that_nothing_makes_are_refused_before_anything_changes() -> None:
    model, inputs = nano(), {"input_ids": tokens()}
    before = capture(model, inputs).program
    plan = choose(before, Recipe.read("w8a8", rotation="off"), refusals=refusals(model, before))
    static = dataclasses.replace(plan.quantized[0].activation, dynamic=False)
    wrong = [dataclasses.replace(entry, activation=static) for entry in plan.quantized]
    modules = dict(model.named_modules())
    plan = dataclasses.replace(plan, quantized=tuple(wrong))
    with pytest.raises(Unsupported, match="per token"):
        write_back(model, before, before, plan)
    assert dict(model.named_modules()) == modules


def test_the_record_travels_with_copies() -> None:
    model, inputs = nano(), {"input_ids": tokens()}
    apply(model, inputs, "w8a8")
    want = output(model, inputs)
    other = copy.deepcopy(model)
    assert record_of(other) == record_of(model)
    assert dataclasses.asdict(record_of(other))["format_version"] == FORMAT_VERSION
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    assert torch.equal(want, output(other, inputs))
