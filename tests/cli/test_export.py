"""Does `qpass export` write a file that computes what the model computes, or say why not?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import qpass
from qpass.cli.main import run
from qpass.cli.source import Loaded
from qpass.errors import ContractBroken
from qpass.targets import onnx_qdq
from qpass.targets.layers import QuantizedLinear
from tests.zoo import specimen, tokens


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    specimen(name).build(0).to(dtype).save_pretrained(folder)
    return str(folder)


def test_what_quantize_wrote_becomes_a_file_that_was_run(tmp_path: Path, capsys) -> None:
    small, file = tmp_path / "small", tmp_path / "model.onnx"
    made = save("llama_tied", tmp_path / "float")
    assert run(["quantize", made, "-r", "w8a16", "-o", str(small)]) == 0
    capsys.readouterr()
    assert run(["export", str(small), "-o", str(file), "--target", "qdq", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["onnx"]
    assert found["files"] == [str(file)]
    assert found["bytes"] == file.stat().st_size
    assert found["linears"] == found["fusible"] == 15
    assert 0 < found["parity"]["error"] < 1e-5
    assert found["parity"]["operators"]["MatMulNBits"] == 15
    names = [value.name for value in onnx.load(file).graph.input]
    assert "past_key_values.1.value" in names


def test_an_encoder_and_a_model_of_bfloat16(tmp_path: Path, capsys) -> None:
    file = tmp_path / "model.onnx"
    assert run(["export", save("bert", tmp_path / "bert"), "-o", str(file)]) == 0
    assert "largest relative error against PyTorch" in capsys.readouterr().out
    narrow = save("gpt2", tmp_path / "gpt2", torch.bfloat16)
    assert run(["export", narrow, "-o", str(file), "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "the file computes in float32" in out
    assert "not verified" in out


def test_activations_that_stay_float_are_one_note(tmp_path: Path, capsys, monkeypatch) -> None:
    model, inputs = specimen("nano_gpt").build(0).float(), {"input_ids": tokens()}
    qpass.quantize(model, "w8a8", inputs=inputs)
    monkeypatch.setattr("qpass.cli.export.load", lambda what: Loaded(model, inputs))
    assert run(["export", "quantized", "-o", str(tmp_path / "model.onnx")]) == 0
    out = capsys.readouterr().out
    assert out.count("activations of 8 bits stay float") == 1
    # the rounding of activations, which the file leaves out, is no defect of the file
    assert 1e-4 < float(out.rpartition(" ")[2]) < 0.2
    assert all(m.activation_bits == 8 for m in model.modules() if isinstance(m, QuantizedLinear))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-o", "model.onnx", "--target", "qdk"], "did you mean 'qdq'"),
        (["-o", "."], "is a directory; name the file to write"),
        (["-o", "absent/model.onnx"], "there is no directory absent"),
        (["-o", "file/model.onnx"], "there is no directory file"),
    ],
)
def test_wrong_options_exit_with_2_before_the_model_is_read(
    options: list[str], says: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("qpass.cli.export.load", lambda what: pytest.fail(f"{what} was read"))
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run(["export", "model", *options]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("absent", "options"), [("onnx", []), ("onnxscript", []), ("onnxruntime", ["--verify"])]
)
def test_an_extra_that_is_missing_is_named(
    absent: str, options: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    find = importlib.util.find_spec
    hidden = lambda name: None if name == absent else find(name)  # noqa: E731  short
    monkeypatch.setattr("qpass.cli.export.load", lambda what: pytest.fail(f"{what} was read"))
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    assert run(["export", "model", "-o", str(tmp_path / "model.onnx"), *options]) == 2
    assert "pip install 'qpass[onnx]'" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch) -> None:
    finish = onnx_qdq._finish

    def wrong(model: ir.Model) -> tuple[int, int]:
        value = next(v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
        value.const_value = ir.tensor(1.01 * value.const_value.numpy(), name=value.name)
        return finish(model)

    monkeypatch.setattr(onnx_qdq, "_finish", wrong)
    file = tmp_path / "model.onnx"
    file.write_text("the old one")
    model, x = torch.nn.Linear(3, 2), torch.ones(2, 3)
    with pytest.raises(ContractBroken, match="no file was written"):
        qpass.export_onnx(model, x, file)
    assert file.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [file]
    assert qpass.export_onnx(model, x, file, verify=False).parity is None
