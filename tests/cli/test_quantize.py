"""Does `qpass quantize` write a model that loads, and refuse what cannot work before it starts?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import qpass
from qpass.cli.main import run
from qpass.targets.layers import QuantizedLinear
from tests.cli.test_evaluate import files, needs_tokenizer
from tests.zoo import specimen

__all__ = ["files"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    where = tmp_path / "float"
    specimen("llama_tied").build(0).to(torch.float32).save_pretrained(where)
    return str(where)


def test_what_is_written_loads_and_computes(folder: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out" / "small"
    assert run(["quantize", folder, "-r", "w8a8", "-o", str(output)]) == 0
    out = capsys.readouterr().out
    assert "MB of weights instead of" in out
    # 7 in each of 2 layers, the head and the embedding
    assert "16 weights quantized, 3 regions rotated, 2 rotations online\n" in out
    assert "declined" not in out
    small, large = qpass.load(output), specimen("llama_tied").build(0).to(torch.float32)
    ids = specimen("llama_tied").inputs()["input_ids"]
    with torch.no_grad():
        got, want = small(ids).logits, large(ids).logits
    assert any(isinstance(m, QuantizedLinear) for m in small.modules())
    assert (got - want).norm() < 0.2 * want.norm()


def test_a_field_of_the_recipe_can_be_set(folder: str, tmp_path: Path, capsys) -> None:
    changes = ("rotation=off", 'head="float"', "seed=3", "weight.format=int4", "weight.block=8")
    options = ["-r", "w8a16", "--set", "weight.scale_format=float16"]
    options += [f"--set={change}" for change in changes]
    assert run(["quantize", folder, *options, "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(tmp_path / "out")
    assert found["megabytes"] < found["float_megabytes"]
    assert (found["quantized"], found["rotated"], found["declined"]) == (15, 0, [])
    head = qpass.load(tmp_path / "out").get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    layers = [m for m in qpass.load(tmp_path / "out").modules() if isinstance(m, QuantizedLinear)]
    assert {(layer.bits, layer.in_features // layer.groups) for layer in layers} == {(4, 8)}


def test_what_has_no_kernels_is_said(folder: str, tmp_path: Path, capsys) -> None:
    options = [folder, "-r", "nvfp4", "-o", str(tmp_path / "out")]
    assert run(["quantize", *options]) == 0
    # all products, the head among them: none reads rows of integers
    assert "15 products on the reference path, without kernels" in capsys.readouterr().out
    assert run(["quantize", *options, "--set=activation=float", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["without_kernels"] == 0


def test_what_stays_float_is_said_once_for_all_layers(folder: str, tmp_path: Path, capsys) -> None:
    changes = ("weight.format=int4", "weight.block=24", "weight.scale_format=float16")
    options = [f"--set={change}" for change in (*changes, "rotation=off")]
    assert run(["quantize", folder, "-r", "w8a16", *options, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("not a multiple of the block 24") == 1
    assert "model.layers.*.mlp.down_proj.weight" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-r", "w4a9"], "did you mean 'w4a"),
        (["--set", "rotashun=off"], "did you mean 'rotation'"),
        (["--set", "rotation"], "expected KEY=VALUE"),
        (["--set", "rotation=sideways"], "sideways"),
        (["--gate", "kl=0.1"], "add --text FILE"),
        (["--gate", "kl=much", "--text", "t"], "expected kl=NUMBER"),
        (["--calibration", "absent.txt"], "absent.txt"),
    ],
)
def test_wrong_options_exit_with_2_before_the_model_is_read(
    options: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    def never(what: str) -> None:
        raise AssertionError(f"{what} was read")

    monkeypatch.setattr("qpass.cli.quantize.load", never)
    assert run(["quantize", "model", "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("qpass.cli.quantize.load", lambda what: pytest.fail("was read"))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for output in ("file", "file/below", "full"):
        assert run(["quantize", "model", "-o", str(tmp_path / output)]) == 2
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    assert "holds no model saved by qpass" in capsys.readouterr().err


@needs_tokenizer
def test_a_failed_gate_writes_nothing_and_exits_with_1(
    files: tuple[str, str, str], tmp_path: Path, capsys
) -> None:
    _, model, text = files
    output = tmp_path / "out"
    options = ["-r", "w8a8", "--length", "16", "--windows", "2", "--text", text]
    command = ["quantize", model, "-o", str(output), *options]
    assert run([*command, "--gate", "kl=1e-12", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["output"] is None
    assert "gate failed" in captured.err
    assert not output.exists()
    assert run([*command, "--gate", "kl=5", "--calibration", text]) == 0
    assert "KL to reference" in capsys.readouterr().out
    assert (output / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", ["npy", "safetensors", "jsonl"])
def test_calibration_may_be_tokens(kind: str, folder: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    file = tmp_path / f"tokens.{kind}"
    if kind == "npy":
        numpy.save(file, ids.numpy())
    elif kind == "safetensors":
        save_file({"input_ids": ids}, file)
    else:
        file.write_text("\n".join(json.dumps({"input_ids": row}) for row in ids.tolist()))
    options = ["-r", "w4a8", "--calibration", str(file), "--length", "9"]
    output, parts = tmp_path / "out", tmp_path / "parts"
    assert run(["quantize", folder, *options, "-o", str(output), "--resume", str(parts)]) == 0
    assert any(parts.glob("*.safetensors"))
    assert run(["quantize", folder, "-r", "w4a8", "-o", str(tmp_path / "plain")]) == 0
    one, other = (load_file(d / "model.safetensors") for d in (output, tmp_path / "plain"))
    assert any(not torch.equal(one[k], other[k]) for k in one if k.endswith("lines"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": 3}', 'expected an object with "text" or "input_ids"'),
        ("a.jsonl", b"[", "is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"input_ids": [1]}', "use one of them"),
        ("a.npy", b"nothing", "is no array of token ids"),
        ("a.safetensors", b"nothing", "is no safetensors file"),
    ],
)
def test_calibration_that_is_none_is_refused(
    name: str, content: bytes, said: str, folder: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / name).write_bytes(content)
    options = ["--calibration", str(tmp_path / name), "-o", str(tmp_path / "out")]
    assert run(["quantize", folder, *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
