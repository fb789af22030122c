"""Is a checkpoint of every version so far, made long ago, still read as it was meant?"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

import qpass
from qpass.errors import BadInput, StateError
from qpass.targets.layers import QuantizedLinear
from qpass.targets.record import FORMAT_VERSION, record_of
from tests.data.make_checkpoint import outputs, where

# another machine sums in another order, and a code on an edge may fall to the other side
NEAR = 2e-3
VERSIONS = range(1, FORMAT_VERSION + 1)
MODEL = where(FORMAT_VERSION) / "model"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("through", [qpass.load, hf.AutoModelForCausalLM.from_pretrained])
def test_it_gives_what_it_gave(through, version: int) -> None:
    model: nn.Module = through(where(version) / "model")
    assert not model.training
    known = load_file(where(version) / "outputs.safetensors")
    got = outputs(model, known.pop("input_ids"))
    assert got.keys() == known.keys()
    for name, want in known.items():
        assert float((got[name] - want).norm() / want.norm()) <= NEAR, name
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {layer.bits for layer in layers} >= {4}
    assert any(layer.online is not None for layer in layers)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_a_changed_model(version: int) -> None:
    model = qpass.load(where(version) / "model")
    record = record_of(model)
    assert record.format_version == FORMAT_VERSION
    assert record.quantized
    assert record.untied
    assert record.plans[0].rotated
    assert record.doors
    with pytest.raises(StateError, match="quantized already"):
        qpass.quantize(model, "w8a8", inputs={"input_ids": torch.arange(3, 9).reshape(2, 3)})


def test_it_is_written_again_byte_for_byte(tmp_path) -> None:
    """The newest, until the format changes: then a fixture of the new version comes."""
    qpass.save(qpass.load(MODEL), tmp_path / "again")
    old, new = (MODEL / "model.safetensors", tmp_path / "again" / "model.safetensors")
    assert old.read_bytes() == new.read_bytes()
    sections = [
        json.loads((where / "config.json").read_text())["quantization_config"]
        for where in (MODEL, tmp_path / "again")
    ]
    for section in sections:
        del section["qpass_version"]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_written_as_the_newest_version(version: int, tmp_path) -> None:
    model = qpass.load(where(version) / "model")
    qpass.save(model, tmp_path / "again")
    section = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == FORMAT_VERSION
    again = qpass.load(tmp_path / "again").state_dict()
    state = model.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 17])
def test_newer_formats_are_refused(version: int, tmp_path) -> None:
    shutil.copytree(MODEL, tmp_path / "newer")
    path = tmp_path / "newer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = version
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match=f"has format {version}.*update qpass"):
        qpass.load(path.parent)
    with pytest.raises(BadInput, match="update qpass"):
        hf.AutoModelForCausalLM.from_pretrained(path.parent)


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_small(version: int) -> None:
    files = [path for path in where(version).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
