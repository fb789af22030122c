"""Do presets of few bits work on whole models: as modules, saved, compiled, and as ONNX files?"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import qpass
import qpass.backend
import qpass.targets.inductor
from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.plan import Recipe
from qpass.targets.layers import QuantizedLinear
from tests.zoo import specimen

# small blocks, which divide the widths of the zoo; and one preset that falls back per channel
BLOCK = 4
PRESETS = ("w2a16-g64", "w2a16-g64-asym", "w3a16-g64", "w4a16-g64-asym", "mxfp4", "nvfp4")
# weights beyond the presets, with activations that have no kernels
MIXED = {
    "e4m3": Recipe("e4m3", QuantSpec("e4m3"), QuantSpec("e4m3", dynamic=True)),
    "asymmetric": Recipe(
        "asymmetric", QuantSpec("int8"), QuantSpec("int8", symmetric=False, dynamic=True)
    ),
    "groups": Recipe(
        "groups",
        QuantSpec("int4", BLOCK, scale_format="bfloat16"),
        QuantSpec("int4", 2, dynamic=True),
    ),
    "nvfp4 weights": Recipe(
        "nvfp4 weights", QuantSpec("e2m1", BLOCK, scale_format="e4m3", tensor_scale=True)
    ),
    "e4m3 by int8": Recipe("e4m3 by int8", QuantSpec("e4m3"), QuantSpec("int8", dynamic=True)),
}


def recipe(name: str) -> Recipe:
    if name in MIXED:
        return MIXED[name]
    found = Recipe.read(name)
    changes: dict[str, object] = {"weight": {"block": BLOCK}}
    if found.activation is not None:
        changes["activation"] = {"block": BLOCK}
    return Recipe.read(name, **changes)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def float32(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the zoo and its inputs, as users have them."""
    entry = specimen(name)
    inputs = {
        key: value.float() if value.is_floating_point() else value
        for key, value in entry.inputs().items()
    }
    return entry.build(0).float(), inputs


def linears(model: nn.Module) -> list[QuantizedLinear]:
    return [m for m in model.modules() if isinstance(m, QuantizedLinear)]


def relative(want: Tensor, got: Tensor) -> float:
    return float((want - got).norm() / want.norm())


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *(("mxfp4", model) for model in ("llama", "gpt2", "vision", "bert")),
        *(("nvfp4", model) for model in ("llama", "gpt2", "vision")),
        *((name, "nano_gpt") for name in (*PRESETS[:4], *MIXED)),
    ],
)
def test_a_saved_model_computes_the_same(name: str, model: str, tmp_path: Path) -> None:
    module, inputs = float32(model)
    fresh = copy.deepcopy(module)
    wanted = recipe(name)
    want = output(module, inputs)
    small = qpass.quantize(module, wanted, inputs=inputs)
    assert wanted.weight is not None
    layers = linears(small)
    assert {layer.spec.format for layer in layers} >= {wanted.weight.format}
    got = output(small, inputs)
    assert 0 < relative(want, got) < (1.3 if wanted.weight.format == "int2" else 1.0)
    qpass.save(small, tmp_path / "saved")
    again = qpass.load(tmp_path / "saved", None if model in ("llama", "gpt2", "bert") else fresh)
    assert torch.equal(output(again, inputs), got)
    state, other = small.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    for layer in layers:
        stored = sum(tensor.nbytes for tensor in layer.canonical().values())
        bias = 0 if layer.bias is None else layer.bias.nbytes
        weights = layer.out_features * layer.in_features
        bits = layer.spec.bits_per_weight(layer.in_features, layer.out_features)
        # rows are padded to whole bytes
        assert -0.01 < stored - bias - weights * bits / 8 < layer.out_features


@pytest.mark.parametrize("name", [*PRESETS[1:], *MIXED])
def test_a_compiled_model_holds_the_same_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qpass.targets.inductor, "compile_fx", lambda graph, *_, **__: graph)
    torch._dynamo.reset()
    module, inputs = float32("nano_gpt")
    wanted = dataclasses.replace(recipe(name), rotation="off", head="float", embedding="float")
    options = {"recipe": wanted, "strict": True}
    compiled = torch.compile(
        copy.deepcopy(module), backend=lambda *g: qpass.backend.backend(*g, options=options)
    )
    got = output(compiled, inputs)
    want = output(qpass.quantize(module, wanted, inputs=inputs), inputs)
    # two float32 orders of summation; rounded activations may fall to the other side of a tie
    assert relative(want, got) < (1e-5 if wanted.activation is None else 0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e4m3", "w3a16-g64"])
def test_half_precision_models_stay_what_they_are(name: str, dtype: torch.dtype) -> None:
    module, inputs = float32("llama")
    want = output(module, inputs)
    module = module.to(dtype)
    got = output(qpass.quantize(module, recipe(name), inputs=inputs), inputs)
    assert got.dtype is dtype
    assert 0 < relative(want, got.float()) < 1


@pytest.mark.parametrize("name", [*PRESETS, *MIXED])
def test_an_onnx_file_decodes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    layer = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8, bias=False)).eval()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    wanted = dataclasses.replace(recipe(name), rotation="off", activation=None)
    if wanted.weight is not None and isinstance(wanted.weight.block, int):
        wanted = dataclasses.replace(wanted, weight=dataclasses.replace(wanted.weight, block=8))
    small = qpass.quantize(layer, wanted, inputs=x)
    report = qpass.export_onnx(small, x, tmp_path / "model.onnx", verify=True)
    assert report.linears == 2
    assert report.parity is not None
    assert report.parity.error < 1e-4
    wider = [note for note in report.notes if "are stored" in note.why]
    assert bool(wider) is ("fp4" in name or name.startswith(("w2", "w3")))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "w3a16-g64"])
def test_transformers_reads_what_was_saved(name: str, tmp_path: Path) -> None:
    module, inputs = float32("llama")
    small = qpass.quantize(module, recipe(name), inputs=inputs)
    qpass.save(small, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(again, inputs), output(small, inputs))
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16
    )
    assert output(half, inputs).dtype is torch.bfloat16


def test_widths_that_blocks_do_not_divide_fall_back_and_say_so() -> None:
    module, inputs = float32("vision")
    small = qpass.quantize(module, "nvfp4", inputs=inputs)
    layers = linears(small)
    assert layers
    assert {(layer.spec.format, layer.spec.block) for layer in layers} >= {("e2m1", "channel")}
    assert all(
        layer.activation is None or layer.activation.block in (16, "channel") for layer in layers
    )


def test_a_checkpoint_whose_bits_do_not_fit_is_refused(tmp_path: Path) -> None:
    module, inputs = float32("nano_gpt")
    fresh = copy.deepcopy(module)
    qpass.save(qpass.quantize(module, recipe("w3a16-g64"), inputs=inputs), tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"format": "int3"', '"format": "int2"'))
    with pytest.raises(BadInput, match="shape"):
        qpass.load(tmp_path / "saved", fresh)
