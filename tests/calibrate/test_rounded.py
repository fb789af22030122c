"""Do roundings get the statistics of what their products really read, once and in order?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import BadInput
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.ops import fake_quantize, quantize_rows
from qpass.rounding import ROUNDINGS, Rounding, Statistic, Stats
from qpass.targets.layers import QuantizedLinear
from tests import zoo

NAMES = ("llama", "gpt2", "bert", "nano_gpt", "gemma3", "vision")


@dataclass(eq=False)
class Seen(Rounding):
    """Nearest rounding that remembers what it was given, or dies at a call."""

    name: str = "seen"
    needs: frozenset[Statistic] = frozenset({Statistic.HESSIAN})
    weights: list[Tensor] = field(default_factory=list[Tensor])
    hessians: list[Tensor] = field(default_factory=list[Tensor])
    dies_at: int | None = None

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        if self.dies_at == len(self.weights):
            raise KeyboardInterrupt
        self.weights.append(weight_nk)
        self.hessians.append(stats[Statistic.HESSIAN])
        return ROUNDINGS["nearest"].round(weight_nk, spec, {})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    ROUNDINGS._load()
    rounding = Seen()
    monkeypatch.setitem(ROUNDINGS._items, rounding.name, rounding)
    return rounding


def batches(name: str, count: int = 3) -> list[Mapping[str, Tensor]]:
    found: list[Mapping[str, Tensor]] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        found.append({k: _like(v, generator) for k, v in zoo.specimen(name).inputs().items()})
    return found


def _like(value: Tensor, generator: torch.Generator) -> Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return torch.randint(3, zoo.VOCABULARY, value.shape, generator=generator)


def read_by(model: nn.Module, data: list[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    """The inputs of every quantized linear, as rows of numbers that it multiplies."""
    rows: dict[str, list[Tensor]] = {}

    def product(layer: QuantizedLinear, x: Tensor) -> Tensor:
        made = compute(layer, x)
        x = x if layer.online is None else layer.online(x)
        if layer.activation_bits is not None:
            codes, scales = quantize_rows(x, layer.activation_bits)
            x = codes.double() * scales.double()
        if layer.activation is not None:
            x = fake_quantize(x, layer.activation)
        rows.setdefault(paths[layer], []).append(x.reshape(-1, x.shape[-1]))
        return made

    paths = {m: p for p, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    compute = QuantizedLinear._product
    # what a hook sees is turned back, the product's own input is not
    with mock.patch.object(QuantizedLinear, "_product", product), torch.no_grad():
        for batch in data:
            model(**batch)
    return rows


@pytest.mark.parametrize("activation", ["float", "int8", "e2m1"])
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_quantized_model(
    name: str, activation: str, seen: Seen
) -> None:
    model, data = zoo.specimen(name).build(0), batches(name)
    spec: object = "float" if activation == "float" else {"format": activation, "dynamic": True}
    recipe = {
        "weight": {"format": "int4"},
        "activation": spec,
        "rounding": "seen",
        "weigh_tokens": False,
    }
    qpass.quantize(model, recipe, calibration=data)
    rows = read_by(model, data)
    once = {path: x for path, x in rows.items() if len(x) == len(data)}
    assert once
    hessians = [torch.cat(x).double() for x in once.values()]
    for x_mk in hessians:
        want = x_mk.mT @ x_mk
        errors = [
            float((want - got).abs().max() / want.abs().max())
            for got in seen.hessians
            if got.shape == want.shape
        ]
        assert min(errors) < 1e-4
    assert len(seen.weights) == len(rows)


def test_a_layer_called_twice_is_rounded_once_on_all_that_it_reads(seen: Seen) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice().double()
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    x = torch.cat([torch.cat((x, torch.tanh(model.layer(x)))) for x in data])
    qpass.quantize(
        model,
        {
            "weight": {"format": "int8"},
            "rounding": "seen",
            "weigh_tokens": False,
            "rotation": "off",
        },
        calibration=data,
    )
    (hessian,) = seen.hessians
    assert torch.allclose(hessian, x.mT @ x, rtol=1e-5, atol=1e-5)


def test_padding_does_not_count(seen: Seen) -> None:
    recipe = {
        "weight": {"format": "int4"},
        "rounding": "seen",
        "weigh_tokens": False,
        "head": "float",
    }
    ids = zoo.tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    padded = torch.where(mask.bool(), ids, zoo.PAD)
    call = {"input_ids": padded, "attention_mask": mask}
    for other in (padded, torch.where(mask.bool(), ids, 9)):
        model = zoo.specimen("llama").build(0)
        qpass.quantize(model, recipe, calibration=[{**call, "input_ids": other}])
    half = len(seen.hessians) // 2
    for one, two in zip(seen.hessians[:half], seen.hessians[half:], strict=True):
        assert torch.allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("dies_at", [0, 3, 8])
def test_a_killed_run_goes_on_to_the_same_bytes(dies_at: int, seen: Seen, tmp_path: Path) -> None:
    recipe, data = (
        {"weight": {"format": "int4"}, "rounding": "seen", "weigh_tokens": False},
        batches("llama"),
    )
    whole = zoo.specimen("llama").build(0)
    qpass.quantize(whole, recipe, calibration=data)
    rounded = len(seen.weights)
    seen.weights.clear()
    seen.dies_at = dies_at
    model = zoo.specimen("llama").build(0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        qpass.quantize(model, recipe, calibration=data, resume=tmp_path / "run")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    seen.dies_at = None
    qpass.quantize(model, recipe, calibration=data, resume=tmp_path / "run")
    assert len(seen.weights) == rounded
    want = whole.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())


def test_a_directory_of_another_run_is_refused(seen: Seen, tmp_path: Path) -> None:
    recipe, data = (
        {"weight": {"format": "int4"}, "rounding": "seen", "weigh_tokens": False},
        batches("llama"),
    )
    qpass.quantize(zoo.specimen("llama").build(0), recipe, calibration=data, resume=tmp_path)
    with pytest.raises(BadInput, match="another model, plan or data"):
        qpass.quantize(
            zoo.specimen("llama").build(0), recipe, calibration=data[:2], resume=tmp_path
        )
    with pytest.raises(BadInput, match="another model, plan or data"):
        qpass.quantize(zoo.specimen("llama").build(1), recipe, calibration=data, resume=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(BadInput, match="holds other files"):
        qpass.quantize(
            zoo.specimen("llama").build(0), recipe, calibration=data, resume=tmp_path / "other"
        )


def test_a_damaged_file_is_made_again(seen: Seen, tmp_path: Path) -> None:
    recipe, data = (
        {"weight": {"format": "int4"}, "rounding": "seen", "weigh_tokens": False},
        batches("llama"),
    )
    first, second = (zoo.specimen("llama").build(0) for _ in range(2))
    qpass.quantize(first, recipe, calibration=data, resume=tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[0].write_bytes(b"half")
    seen.weights.clear()
    qpass.quantize(second, recipe, calibration=data, resume=tmp_path)
    assert len(seen.weights) == 1
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in second.state_dict().items())


def test_data_is_asked_for_where_a_rounding_needs_it(seen: Seen) -> None:
    model = zoo.specimen("llama").build(0)
    with pytest.raises(BadInput, match="pass calibration batches"):
        qpass.quantize(
            model, {"weight": {"format": "int4"}, "rounding": "seen", "weigh_tokens": False}
        )


def test_data_that_is_not_finite_is_refused(seen: Seen) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.full((3, 4), torch.nan)
    with pytest.raises(BadInput, match="not finite"):
        qpass.quantize(
            model,
            {"weight": {"format": "int4"}, "rounding": "seen", "weigh_tokens": False},
            calibration=[x],
            inputs=torch.ones(3, 4),
        )


@pytest.mark.parametrize("rounding", sorted(r.name for r in ROUNDINGS if r.needs))
def test_every_rounding_gets_what_it_needs(rounding: str) -> None:
    model, reference = (zoo.specimen("vision").build(0) for _ in range(2))
    data = batches("vision", 16)
    recipe = {"weight": {"format": "int4"}, "rounding": rounding, "rotation": "off"}
    qpass.quantize(model, recipe, calibration=data)
    with torch.no_grad():
        got, want = model(**data[0]), reference(**data[0])
    assert 0 < (got - want).norm() < 0.5 * want.norm()
