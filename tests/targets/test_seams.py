"""Do modules hold pairs: a layer for each product, and a module around what reads a part?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.plan import Plan
from qpass.targets.turned import Turned
from tests.transform.test_pairs import (
    CASES,
    GPT2,
    WIDTH,
    Block,
    bare,
    language,
    layer,
    rms,
    stack,
)
from tests.zoo import _GATED, randomise, tiny, tokens

LIMIT = 1e-9
# norms that cast to float32 inside are as exact as that when the module itself runs
EAGER = 1e-5
Case = Callable[[], tuple[nn.Module, Mapping[str, Tensor]]]

# models whose last norm is the only reader of the stream that has to see it as it was
LAST_NORM: dict[str, Case] = {
    "llama": lambda: language(hf.LlamaConfig(**_GATED)),
    "gpt2": lambda: language(GPT2),
    "vit": lambda: (
        tiny(
            hf.ViTConfig(
                hidden_size=36,
                num_hidden_layers=2,
                num_attention_heads=3,
                intermediate_size=52,
                image_size=8,
                patch_size=4,
            ),
            kind=hf.AutoModel,
        ),
        {
            "pixel_values": torch.randn(
                2, 3, 8, 8, generator=torch.Generator().manual_seed(0)
            ).double()
        },
    ),
}


def output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found[0] if isinstance(found, tuple) else getattr(found, "last_hidden_state", found)


def close(got: Tensor, want: Tensor, limit: float = EAGER) -> bool:
    return bool((got - want).abs().max() <= limit * want.abs().max())


@pytest.mark.parametrize("name", LAST_NORM)
def test_a_base_model_turns_back_once(name: str) -> None:
    model, inputs = LAST_NORM[name]()
    want = output(model, inputs)
    report = qpass.rotate(model, inputs)
    around = [path for path, m in model.named_modules() if isinstance(m, Turned)]
    assert len(around) == 1
    assert len(report.plan.paired) == 1
    assert close(output(model, inputs), want)
    assert report.max_error <= LIMIT
    assert report.eager_error <= (EAGER if name == "llama" else LIMIT)
    # what a part shows is what it was
    shown: list[Tensor] = []
    fresh, _ = LAST_NORM[name]()
    for one in (fresh, model):
        handle = one.get_submodule(around[0]).register_forward_pre_hook(
            lambda _, args: shown.append(args[0].detach().clone())
        )
        output(one, inputs)
        handle.remove()
    assert close(shown[1], shown[0])
    assert close(output(copy.deepcopy(model), inputs), want)


@pytest.mark.parametrize("name", LAST_NORM)
def test_a_saved_model_turns_back_too(name: str, tmp_path) -> None:
    model, inputs = LAST_NORM[name]()
    want = output(model, inputs)
    qpass.rotate(model, inputs)
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved")
    assert close(output(loaded, inputs), output(model, inputs))
    assert close(output(loaded, inputs), want)


@pytest.mark.parametrize("name", CASES)
def test_modules_hold_no_more_transforms_than_before_and_compute_the_same(name: str) -> None:
    model, inputs = CASES[name][0]()
    want = output(model, inputs)
    report = qpass.rotate(model, inputs)
    assert len(report.online) <= CASES[name][1]
    assert close(output(model, inputs), want)


@pytest.mark.parametrize("norm", [rms, layer, bare], ids=lambda norm: norm.__name__)
def test_what_no_module_can_hold_is_left_to_products(norm: Callable[[], nn.Module]) -> None:
    # the last state is returned as it is: no module reads it
    model, inputs = stack(norm)
    report = qpass.rotate(model, inputs)
    assert report.plan.paired == ()
    assert len(report.online) == 7


def test_a_plan_makes_the_same_model_in_both_scopes(tmp_path) -> None:
    model, inputs = LAST_NORM["llama"]()
    want = output(model, inputs)
    report = qpass.rotate(model, inputs)
    report.plan.save(tmp_path / "plan.json")
    again, _ = LAST_NORM["llama"]()
    assert qpass.rotate(again, inputs, plan=tmp_path / "plan.json").plan == report.plan
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert close(output(again, inputs), want)
    assert Plan.load(tmp_path / "plan.json").paired == report.plan.paired


def test_a_quantized_base_model_turns_back() -> None:
    model, inputs = (
        tiny(hf.LlamaConfig(**_GATED), kind=hf.AutoModel, dtype=torch.float32),
        {"input_ids": tokens()},
    )
    want = output(model, inputs)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "on"}, inputs=inputs)
    assert any(isinstance(m, Turned) for m in model.modules())
    error = (output(model, inputs) - want).norm() / want.norm()
    assert error < 0.05


@pytest.mark.parametrize("name", LAST_NORM)
def test_a_second_run_leaves_what_turns_as_it_is(name: str) -> None:
    model, inputs = LAST_NORM[name]()
    want = output(model, inputs)
    first = qpass.rotate(model, inputs)
    second = qpass.rotate(model, inputs)
    assert second.online == first.online
    assert second.plan.paired == second.plan.online == ()
    assert any("earlier run" in d.why for d in second.declined)
    assert close(output(model, inputs), want)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "on"}, inputs=inputs)
    error = (output(model, inputs) - want).norm() / want.norm()
    assert error < 0.1


@pytest.mark.parametrize("name", LAST_NORM)
def test_a_model_that_turns_back_can_be_traced_and_exported(name: str, tmp_path) -> None:
    model, inputs = LAST_NORM[name]()
    model = model.float()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    want = output(model, inputs)
    qpass.rotate(model, inputs)
    exported = torch.export.export(model, (), dict(inputs)).module()
    assert close(output(exported, inputs), want, 1e-4)
    report = qpass.export_onnx(model, inputs, tmp_path / "model.onnx")
    assert report.parity.error < 1e-4


def test_an_inspection_says_what_turns_in_part_and_why() -> None:
    model, inputs = LAST_NORM["llama"]()
    found = qpass.inspect(model, inputs)
    report = qpass.rotate(model, inputs)
    assert (found.paired, found.coverage) == (report.plan.paired, report.coverage)
    assert {p.input for p in found.products if "down" not in p.site} == {"folded"}
    for word in ("turned in part", "1 instead of 4 transforms", "a norm's gain"):
        assert word in str(found)


class Between(nn.Module):
    """Blocks between two norms that keep their gains: the stream turns at one and back at another.

    With `shown`, what the first norm makes is returned too, so it cannot turn.
    """

    def __init__(self, norm: Callable[[], nn.Module], *, shown: bool = False) -> None:
        super().__init__()
        self.inp, self.first, self.last = nn.Linear(7, WIDTH), norm(), norm()
        self.blocks = nn.ModuleList(Block(norm(), scaled=False, modulated=False) for _ in range(4))
        self.shown = shown

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        first = x = self.first(self.inp(x))
        for block in self.blocks:
            x = block(x, x)
        return (self.last(x), first) if self.shown else self.last(x)


def between(norm: Callable[[], nn.Module], **options) -> tuple[nn.Module, Mapping[str, Tensor]]:
    model = Between(norm, **options).double().eval()
    randomise(model, 0)
    return model, {"x": stack(norm)[1]["x"]}


@pytest.mark.parametrize("norm", [rms, layer], ids=lambda norm: norm.__name__)
def test_a_norm_turns_what_it_makes(norm: Callable[[], nn.Module], tmp_path) -> None:
    model, inputs = between(norm)
    fresh = copy.deepcopy(model)
    want = output(model, inputs)
    report = qpass.rotate(model, inputs)
    around = {path: m.transforms for path, m in model.named_modules() if isinstance(m, Turned)}
    assert around.keys() == {"first", "last"}
    assert around["first"][0] is around["last"][1] is None
    # the input of the first layer and the inner widths, and one at each of the two norms
    assert len(report.online) == 1 + 4 + 2
    assert close(output(model, inputs), want, LIMIT)
    shown: list[Tensor] = []
    for one in (fresh, model):
        with one.first.register_forward_hook(lambda m, args, out: shown.append(out.clone())):
            output(one, inputs)
    assert close(shown[1], shown[0], LIMIT)
    qpass.save(model, tmp_path / "saved")
    loaded = qpass.load(tmp_path / "saved", model=between(norm)[0])
    assert close(output(loaded, inputs), want, LIMIT)
    assert qpass.rotate(model, inputs).online == report.online


def test_what_is_shown_is_not_turned_where_it_is_made() -> None:
    model, inputs = between(rms, shown=True)
    want = output(model, inputs)
    report = qpass.rotate(model, inputs)
    assert not any(isinstance(m, Turned) for m in model.modules())
    assert len(report.online) == 1 + 4 + 4
    assert close(output(model, inputs), want, LIMIT)


def test_norms_behind_each_half_turn_what_they_make() -> None:
    config = hf.Gemma3TextConfig(
        **_GATED, head_dim=8, layer_types=["sliding_attention", "full_attention"]
    )
    model, inputs = tiny(config), {"input_ids": tokens()}
    with torch.no_grad():
        want = model(**inputs).logits
    report = qpass.rotate(model, inputs)
    # four norms, and two inner widths; before products, the head would be one more
    assert len(report.online) == 4 + 2
    with torch.no_grad():
        assert close(model(**inputs).logits, want)


@pytest.mark.parametrize("held", [True, False])
def test_pairs_that_no_module_can_hold_are_not_made(monkeypatch, *, held: bool) -> None:
    if not held:
        monkeypatch.setattr(qpass.bounds, "holds_turns", lambda *_: False)
    model, inputs = LAST_NORM["llama"]()
    want = output(model, inputs)
    report = qpass.rotate(model, inputs)
    assert report.max_error <= LIMIT
    assert bool(report.plan.paired) is held
    assert (output(model, inputs) - want).abs().max() <= EAGER * want.abs().max()
