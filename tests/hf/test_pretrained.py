"""Is a model read whole, exactly and never with pickle, and is everything else refused?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpass.errors import BadInput
from qpass.hf.pretrained import load_model, token_ids
from tests.data.fetch import DATA, GGUF, MODEL
from tests.zoo import specimen


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a small model in bfloat16."""
    where = tmp_path / "model"
    specimen("llama_tied").build(0).to(torch.bfloat16).save_pretrained(where)
    return where


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "bert"])
def test_a_saved_model_comes_back_equal(name: str, tmp_path: Path) -> None:
    saved = specimen(name).build(1).to(torch.float32)
    saved.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(saved)
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == saved.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in saved.state_dict().items())


def test_the_stored_precision_is_kept(folder: Path) -> None:
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}


def test_a_missing_weight_is_an_error_and_not_a_random_one(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(folder)


def test_a_pickled_checkpoint_is_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="no model can be read"):
        load_model(folder)


def test_a_cut_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadInput, match="damaged or not complete"):
        load_model(folder)


def test_other_files_and_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(BadInput, match="expected a directory"):
        load_model(folder / "config.json")
    with pytest.raises(BadInput, match="no such file"):
        load_model(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("no weights here")
    with pytest.raises(BadInput, match="no model can be read"):
        load_model(tmp_path / "text.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["HerOwnModel"], "no HerOwnModel"),
        ("model_type", "her_own", "no model can be read"),
        ("hidden_size", 96, "its config.json asks for"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    folder: Path, key: str, value: object, message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(BadInput, match=message):
        load_model(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="no tokenizer can be read"):
        token_ids(folder, "text")


@pytest.mark.slow
def test_a_gguf_file_widens_to_what_was_converted_and_saves(tmp_path: Path) -> None:
    model = load_model(DATA / "packages" / GGUF)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    assert torch.equal(
        token_ids(MODEL, "A more perfect union."),
        token_ids(DATA / "packages" / GGUF, "A more perfect union."),
    )
