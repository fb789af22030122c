"""Are tensors that are made one after the other written as safetensors writes them at once?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import BadInput
from qpass.hf.checkpoint import save
from qpass.targets.layers import QuantizedLinear
from qpass.targets.shards import TYPES, write_shards
from tests import zoo


def nothing(name: str) -> Mapping[str, Tensor]:
    raise AssertionError(name)


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    tensors = {f"a.{dtype}": values.to(dtype) for dtype in TYPES}
    tensors |= {"empty": torch.zeros(0, 4), "number": torch.tensor(3.0), "äö": values.mT}
    write_shards(tmp_path, tensors, 10**9, nothing)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    want = safetensors.torch.save(whole, {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == want


def test_described_tensors_are_made_when_their_turn_comes(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> Mapping[str, Tensor]:
        made.append(name)
        return {"b.wide": torch.arange(4.0), "b.narrow": torch.ones(3, dtype=torch.int8)}

    described = {name: torch.empty_like(t, device="meta") for name, t in make("").items()}
    made.clear()
    write_shards(tmp_path, {"a": torch.zeros(2), **described}, 10**9, make)
    assert len(made) == 1
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == {"a", "b.wide", "b.narrow"}
    assert torch.equal(found["b.wide"], torch.arange(4.0))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "bert", "nano_gpt"])
def test_saving_makes_the_tensors_of_one_layer_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = zoo.specimen(name)
    model = qpass.quantize(chosen.build(0).float(), "w8a16", inputs=chosen.inputs())
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    asked: list[nn.Module] = []
    stored = QuantizedLinear.stored
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state |= {f"{path}.{name}": tensor for name, tensor in stored(module).items()}

    def seen(layer: QuantizedLinear) -> dict[str, Tensor]:
        asked.append(layer)
        return stored(layer)

    monkeypatch.setattr(QuantizedLinear, "stored", seen)
    save(model, tmp_path / "out")
    assert len(asked) == len(layers)
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_what_holds_no_values_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no values"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_types_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="complex128"):
        write_shards(tmp_path, {"z": torch.zeros(2, dtype=torch.complex128)}, 10, nothing)
