"""Is what is saved what is loaded, bit for bit, and nothing else ever?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from qpass.errors import BadInput, StateError
from qpass.hf.checkpoint import load, save
from qpass.targets import checkpoint
from qpass.targets.layers import QuantizedLinear
from qpass.targets.record import record_of
from tests.targets.driver import apply
from tests.targets.test_module import nano, output
from tests.zoo import NanoGPT, randomise, specimen, tokens

INPUTS = {"input_ids": tokens()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A tied language model, quantized with an online transform, and where it is saved."""
    model = specimen("llama_tied").build(0).float()
    apply(model, INPUTS, "w8a8")
    where = tmp_path_factory.mktemp("saved") / "model"
    save(model, where)
    return model, where


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[NanoGPT, Path]:
    """A module that transformers knows nothing of, and where it is saved."""
    model = nano()
    apply(model, INPUTS, "w8a16", rotation="on")
    where = tmp_path_factory.mktemp("kept") / "plain"
    save(model, where)
    return model, where


@pytest.fixture
def plain(kept, tmp_path) -> tuple[NanoGPT, Path]:
    """The same, with a directory that may be damaged."""
    model, where = kept
    shutil.copytree(where, tmp_path / "plain")
    return model, tmp_path / "plain"


def files(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in where.iterdir()}


def test_a_language_model_comes_back(saved) -> None:
    model, where = saved
    back = load(where)
    assert torch.equal(output(model, INPUTS), output(back, INPUTS))
    assert record_of(back) == record_of(model)
    assert type(back) is type(model)
    assert back.config.tie_word_embeddings is False


def test_transformers_reads_it_too(saved) -> None:
    model, where = saved
    back = transformers.AutoModelForCausalLM.from_pretrained(where)
    assert torch.equal(output(model, INPUTS), output(back, INPUTS))
    assert back.dtype is torch.float32
    half = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16)
    assert output(half, INPUTS).dtype is torch.bfloat16
    scales = [m.row_scales.dtype for m in half.modules() if isinstance(m, QuantizedLinear)]
    assert set(scales) == {torch.float32}
    with pytest.raises((BadInput, StateError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(
            where, quantization_config={"quant_method": "gptq", "bits": 4}
        )


def test_transformers_may_be_imported_later() -> None:
    code = (
        "import sys, qpass"
        "; assert 'transformers' not in sys.modules"
        "; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known"
        "; assert 'qpass' in known"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_saving_again_gives_the_same_bytes(saved, tmp_path) -> None:
    model, where = saved
    save(model, tmp_path / "again")
    save(load(where), tmp_path / "loaded")
    assert files(where) == files(tmp_path / "again") == files(tmp_path / "loaded")


def test_whoever_may_read_one_file_may_read_all(saved) -> None:
    _, where = saved
    assert len({path.stat().st_mode for path in where.iterdir()}) == 1


def test_a_plain_module_comes_back(plain) -> None:
    model, where = plain
    back = load(where, model=nano())
    assert torch.equal(output(model, INPUTS), output(back, INPUTS))
    assert record_of(back) == record_of(model)
    with pytest.raises(BadInput, match="pass a fresh one"):
        load(where)
    with pytest.raises(BadInput, match="another model"):
        load(where, model=torch.nn.Linear(3, 3))


def test_tied_weights_are_stored_once(tmp_path) -> None:
    model = nano()
    save(model, tmp_path / "float")
    names = checkpoint.read_tensors(tmp_path / "float")
    assert ("head.weight" in names) != ("table.weight" in names)
    fresh = nano()
    randomise(fresh, 1)
    back = load(tmp_path / "float", model=fresh)
    state = back.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # products of floats differ in the last bit where tensors lie differently in memory
    torch.testing.assert_close(output(back, INPUTS), output(model, INPUTS), rtol=1e-12, atol=1e-12)
    assert back.head.weight is back.table.weight


def test_shards_hold_the_same_tensors(plain, monkeypatch, tmp_path) -> None:
    model, where = plain
    whole = checkpoint.read_tensors(where)
    config = checkpoint.read_config(where)
    checkpoint.write(tmp_path / "split", config, whole, {}, shard_bytes=4000)
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 2
    back = load(tmp_path / "split", model=nano())
    assert torch.equal(output(model, INPUTS), output(back, INPUTS))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda where: (where / "config.json").unlink(), "no config.json"),
        (lambda where: (where / "config.json").write_text("{"), "cannot be read"),
        (lambda where: (where / "config.json").write_text("{}"), "not saved by qpass"),
        (lambda where: (where / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda where: truncate(where / "model.safetensors"), "damaged"),
        (lambda where: edit(where, format_version=3), "update qpass"),
        (lambda where: edit(where, format_version="1"), "format_version"),
        (lambda where: edit(where, layers=[]), "does not fit"),
        (lambda where: edit(where, layers=[{"path": "head"}]), "not understood"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_directory_is_refused(plain, damage, says: str) -> None:
    _, where = plain
    damage(where)
    with pytest.raises(BadInput, match=says):
        load(where, model=nano())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit(where: Path, **changes: object) -> None:
    config = json.loads((where / "config.json").read_text())
    config["quantization_config"] |= changes
    (where / "config.json").write_text(json.dumps(config))


def test_an_interrupted_save_leaves_the_old_artifact(plain, monkeypatch) -> None:
    model, where = plain
    before = files(where)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_shards", fail)
    with pytest.raises(KeyboardInterrupt):
        save(model, where)
    assert files(where) == before
    with pytest.raises(KeyboardInterrupt):
        save(model, where.parent / "new")
    assert [path.name for path in where.parent.iterdir()] == [where.name]


def test_saving_over_a_save_replaces_it(plain) -> None:
    model, where = plain
    (where / "config.json").write_text((where / "config.json").read_text().replace("w8a16", "x"))
    save(model, where)
    load(where, model=nano())
    assert [path.name for path in where.parent.iterdir()] == [where.name]


def test_a_directory_of_something_else_is_refused(plain, tmp_path) -> None:
    model, where = plain
    (where / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"notes\.txt"):
        save(model, where)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        save(model, other)
    with pytest.raises(BadInput, match="is a file"):
        save(model, other / "thesis.tex")
    assert (other / "thesis.tex").read_text() == "mine"


def test_nothing_is_pickled(saved) -> None:
    _, where = saved
    assert {path.suffix for path in where.iterdir()} == {".json", ".safetensors"}
