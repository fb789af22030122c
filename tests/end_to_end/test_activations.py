"""Is each kind of activation the same in a module, compiled, reloaded, in ONNX and by hand?"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ops import fake_quantize
from qpass.plan import Plan
from qpass.report import plan_table
from qpass.targets.layers import QuantizedLinear
from qpass.targets.record import record_of
from tests import zoo

# a decoder, an encoder with LayerNorm and biases, a decoder with Conv1D, a vision model
NAMES = ("llama", "bert", "gpt2", "vision")
STATIC = {"block": "tensor", "dynamic": False}
KINDS: Mapping[str, Mapping[str, object]] = {
    "static": {"activation": {"format": "int8", **STATIC}},
    "static offsets": {"activation": {"format": "int8", "symmetric": False, **STATIC}},
    "static percentile": {"activation": {"format": "int8", **STATIC}, "ranges": "percentile"},
    "static float8": {"activation": {"format": "e4m3", **STATIC}},
    "offsets": {"activation": {"format": "int8", "symmetric": False, "dynamic": True}},
    "four bits": {"activation": {"format": "int4", "dynamic": True}},
    "four bits in blocks": {"activation": {"format": "int4", "block": 4, "dynamic": True}},
}
FEW = pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "four bits"), ("bert", "static offsets"), ("gpt2", "offsets"), ("vision", "static")],
)


def batches(name: str, count: int = 2) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for key, value in zoo.specimen(name).inputs().items():
            if value.is_floating_point():
                made[key] = torch.randn(value.shape, generator=g)
            else:
                made[key] = torch.randint(3, zoo.VOCABULARY, value.shape, generator=g)
        found.append(made)
    return found


def recipe(kind: str) -> dict[str, object]:
    return {"recipe": "w8a8", "weigh_tokens": True, "rounding": "nearest", **KINDS[kind]}


@functools.cache
def quantized(name: str, kind: str) -> nn.Module:
    """Shared: nobody may change it."""
    model = zoo.specimen(name).build(0).float()
    return qpass.quantize(model, recipe(kind), calibration=batches(name))


def first(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def relative(want: Tensor, got: Tensor) -> float:
    return float((want - got).norm() / want.norm())


def specs(model: nn.Module) -> dict[str, QuantSpec | None]:
    return {q.site: q.activation for q in record_of(model).plans[-1].quantized}


def by_hand(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The product in float64, of the weight as numbers and the input as its spec reads."""
    x = x if layer.online is None else layer.online(x)
    if layer.activation is not None:
        x = fake_quantize(x, layer.activation)
    y = x.double() @ layer._numbers(torch.float64).mT
    return (y if layer.bias is None else y + layer.bias.double()).to(x.dtype)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(NAMES[:1], KINDS), *itertools.product(NAMES[1:], ["static offsets"])],
)
def test_a_module_computes_what_is_written(name: str, kind: str) -> None:
    model, inputs = quantized(name, kind), batches(name)[1]
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    wanted = [layer for layer in layers if layer.activation is not None]
    assert wanted
    product, worst = QuantizedLinear._product, list[float]()

    def both(layer: QuantizedLinear, x: Tensor) -> Tensor:
        got = product(layer, x)
        if layer.activation is not None:
            worst.append(relative(by_hand(layer, x), got))
        return got

    with mock.patch.object(QuantizedLinear, "_product", both):
        got = first(model, inputs)
    # another order of float32 sums may turn a tie
    assert sorted(worst)[len(worst) // 2] < 1e-5
    assert max(worst) < 0.05
    error = relative(first(zoo.specimen(name).build(0).float(), inputs), got)
    assert error < (0.15 if "four" not in kind and "8" not in kind else 1.0)


@FEW
def test_a_saved_plan_gives_the_same(name: str, kind: str, tmp_path: Path) -> None:
    plan = record_of(quantized(name, kind)).plans[-1]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    again = zoo.specimen(name).build(0).float()
    qpass.quantize(again, plan=tmp_path / "plan.json", inputs=batches(name)[0])
    inputs = batches(name)[1]
    want = first(quantized(name, kind), inputs)
    assert torch.equal(first(again, inputs), want)


@pytest.mark.parametrize("kind", ["static offsets", "static float8", "offsets", "four bits"])
def test_a_compiled_model_reads_the_same_grids(kind: str) -> None:
    """One product, so that no tie of an earlier one decides."""
    layer = nn.Linear(48, 20)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(5, 48, generator=generator) + 0.5 for _ in range(2)]
    model, plain = (nn.Sequential(layer, nn.Tanh()).eval() for _ in range(2))
    qpass.quantize(model, recipe(kind), calibration=data)
    plan = record_of(model).plans[-1]
    assert isinstance(plain[0], nn.Linear)
    assert plan.quantized[0].activation is not None
    fast = torch.compile(plain, backend="qpass", options={"plan": plan})
    with torch.no_grad():
        assert relative(model(data[0]), fast(data[0])) < 1e-5


@pytest.mark.parametrize("kind", ["static", "static offsets", "static float8", "four bits"])
def test_a_checkpoint_comes_back_the_same(kind: str, tmp_path: Path) -> None:
    model, inputs = quantized("llama", kind), batches("llama")[1]
    qpass.save(model, tmp_path / "saved")
    again = qpass.load(tmp_path / "saved")
    assert specs(again) == specs(model)
    assert torch.equal(first(again, inputs), first(model, inputs))


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "static"), ("bert", "static offsets"), ("vision", "static")]
)
def test_static_integers_are_in_the_onnx_file(name: str, kind: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    report = qpass.export_onnx(quantized(name, kind), batches(name)[1], tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.error < 1e-4
    graph = onnx.load(tmp_path / "model.onnx").graph
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    known = {value.name for value in graph.initializer}
    assert quantizers
    assert all(set(node.input[1:]) <= known for node in quantizers)
    # every product with integer weights takes integers, but for one of two matrices and a bias
    assert report.parity.operators["MatMulIntegerToFloat"] >= report.linears - (name == "vision")


def test_what_onnx_cannot_hold_is_a_note(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, inputs = quantized("llama", "static float8"), batches("llama")[1]
    report = qpass.export_onnx(model, inputs, tmp_path / "model.onnx")
    assert all("stay float" in note.why for note in report.notes)
    assert len(report.notes) == report.linears


def test_sites_of_one_value_share_one_spec() -> None:
    found = specs(quantized("llama", "static"))
    heads = [s for site, s in found.items() if "0.self_attn.q" in site or "0.self_attn.k" in site]
    assert len(heads) == 2
    assert heads[0] == heads[1]
    assert heads[0] is not None
    assert heads[0].scale is not None
    assert len({spec for spec in found.values() if spec is not None}) > 3


def test_a_layer_called_twice_has_one_range_for_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(10 * torch.tanh(self.layer(x)))

    model = Twice()
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner = 10 * torch.tanh(model.layer(x))
    given = {**recipe("static"), "ranges": "minmax", "rotation": "off", "head": "float"}
    qpass.quantize(model, given, calibration=[x])
    assert isinstance(model.layer, QuantizedLinear)
    assert model.layer.activation is not None
    largest = max(float(x.abs().max()), float(inner.abs().max()))
    assert model.layer.activation.scale == pytest.approx(largest / 127, rel=1e-5)


def test_steps_of_channels_migrate_so_that_one_scale_serves_all() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16), nn.Tanh())
        size = torch.ones(48)
        size[[3, 17]] = 100.0
        with torch.no_grad():
            model[0].weight.mul_(size[:, None])
            model[2].weight.div_(size)
        return model.eval()

    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(64, 16, generator=generator) for _ in range(4)]
    given = {"recipe": "w8a8-static", "rotation": "off", "rounding": "nearest"}
    errors = list[float]()
    for transform in ("fixed", "migrate"):
        model = qpass.quantize(build(), {**given, "transform": transform}, calibration=data)
        with torch.no_grad():
            errors.append(relative(build()(data[0]), model(data[0])))
        assert all(m.online is None for m in model.modules() if isinstance(m, QuantizedLinear))
    assert errors[1] < 0.2 * errors[0]


def test_an_encoder_with_a_decoder(tmp_path: Path) -> None:
    config = hf.T5Config(
        vocab_size=zoo.VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = zoo.tiny(config, kind=hf.AutoModelForSeq2SeqLM, dtype=torch.float32)
    data = [
        {"input_ids": zoo.tokens(2, 9, seed), "decoder_input_ids": zoo.tokens(2, 6, seed + 10)}
        for seed in range(2)
    ]
    errors = list[float]()
    for preset in ("w8a8-static", "w8a8"):
        got = copy.deepcopy(model)
        qpass.quantize(got, {"recipe": preset, "rounding": "nearest"}, calibration=data)
        errors.append(relative(first(model, data[1]), first(got, data[1])))
        qpass.save(got, tmp_path / preset)
        assert torch.equal(first(qpass.load(tmp_path / preset), data[1]), first(got, data[1]))
        rows = plan_table(record_of(got).plans[-1]).rows
        assert any("static int8 input" in str(row) for row in rows) is (preset != "w8a8")
    assert errors[0] < 2 * errors[1]


def test_padding_does_not_count() -> None:
    model, data = zoo.specimen("llama").build(0).float(), batches("llama")
    mask = torch.ones_like(data[0]["input_ids"])
    mask[:, :3] = 0
    masked = [{**batch, "attention_mask": mask} for batch in data]
    given = {**recipe("static"), "ranges": "minmax", "rotation": "off", "weigh_tokens": False}
    seen = list[float]()
    site = model.model.layers[0].self_attn.q_proj
    hook = site.register_forward_pre_hook(
        lambda _, args: seen.append(float(args[0][mask.bool()].abs().max()))
    )
    for batch in masked:
        first(model, batch)
    hook.remove()
    qpass.quantize(model, given, calibration=masked)
    spec = specs(model)["model.layers.0.self_attn.q_proj.weight"]
    assert spec is not None
    assert spec.scale == pytest.approx(max(seen) / 127, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": {"format": "int8", **STATIC}}, "activation.dynamic = false"),
        ({"ranges": "mse"}, "ranges = 'mse'"),
    ],
    ids=str,
)
def test_ranges_without_data_say_so(change: dict[str, object], says: str) -> None:
    given = {"recipe": "w8a8", "rotation": "off", **change}
    model, inputs = nn.Linear(8, 4).eval(), torch.randn(2, 8)
    with pytest.raises(BadInput, match=says):
        qpass.quantize(model, given, inputs=inputs)
    assert type(model) is nn.Linear
    fast = torch.compile(model, backend="qpass", options={"recipe": given})
    with pytest.raises(BadInput, match=says), torch.no_grad():
        fast(inputs)


def test_a_given_scale_needs_no_data() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    given = {
        "weight": {"format": "int8"},
        "activation": {"format": "int8", "scale": 0.05, **STATIC},
        "rotation": "off",
    }
    qpass.quantize(model, given, inputs=torch.randn(2, 8))
    assert isinstance(model[0], QuantizedLinear)
    assert model[0].activation == QuantSpec("int8", "tensor", scale=0.05)


def test_values_that_are_not_finite_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh()), torch.randn(3, 8)
    x[1, 2] = torch.inf
    given = {**recipe("static"), "weigh_tokens": False}
    with pytest.raises(BadInput, match="not finite"):
        qpass.quantize(model, given, calibration=[x])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"ranges": "mesa"}, "no range"),
        ({"ranges": "percentile"}, "ranges = "),
        ({"activation": "float", "ranges": "mse"}, "ranges = "),
        ({"activation": {"dynamic": False}}, "activation.dynamic = "),
        ({"weight": {"block": "tensor", "scale": 1.0}}, "weight.scale = "),
    ],
    ids=str,
)
def test_recipes_that_mean_nothing_are_refused(change: dict[str, object], key: str) -> None:
    with pytest.raises(qpass.QpassError, match=f"^{key}"):
        qpass.plan.Recipe.read({"recipe": "w8a8", **change})
