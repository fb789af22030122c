"""Does `qpass inspect` show what was found, and what was refused and why?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qpass.cli.main import run
from tests.zoo import specimen


@pytest.fixture
def folder(tmp_path: Path) -> str:
    specimen("llama_tied").build(0).to(torch.float32).save_pretrained(tmp_path)
    return str(tmp_path)


def test_regions_products_and_refusals(folder: str, capsys) -> None:
    assert run(["inspect", folder]) == 0
    out = capsys.readouterr().out
    assert "regions\n" in out
    assert "products\n" in out
    assert "free" in out


def test_as_json(folder: str, capsys) -> None:
    assert run(["inspect", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"regions", "products", "declined", "inputs of products"} == found.keys()
    (inputs,) = found["inputs of products"]
    assert inputs["folded"] + inputs["online"] + inputs["declined"] == pytest.approx(1)
    assert all(product["why"] for product in found["products"])


def test_layers_that_are_alike_share_a_row(folder: str, capsys) -> None:
    assert run(["inspect", folder]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj.weight" in out
    assert "model.layers.1.mlp.down_proj.weight" not in out


def test_a_page_is_written_whole_or_not_at_all(
    folder: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    page = tmp_path / "report.html"
    assert run(["inspect", folder, "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "model.layers.*.mlp.down_proj.weight" in text
    assert "regions\n" in capsys.readouterr().out
    before = set(tmp_path.iterdir())
    for wrong in (tmp_path, tmp_path / "absent" / "report.html"):
        assert run(["inspect", folder, "--html", str(wrong)]) == 2
    monkeypatch.setattr("qpass.cli.output.Path.replace", _no_space)
    assert run(["inspect", folder, "--html", str(page)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == text
    assert set(tmp_path.iterdir()) == before


def _no_space(source: Path, target: Path) -> None:
    raise OSError(28, "No space left on device")


def test_what_is_no_model_exits_with_2(tmp_path: Path, capsys) -> None:
    assert run(["inspect", str(tmp_path / "absent")]) == 2
    assert run(["inspect", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no model at" in captured.err
    assert "has no config.json" in captured.err


def test_a_factory_without_inputs_is_told_so(tmp_path: Path, monkeypatch, capsys) -> None:
    text = '"""A model."""\nimport torch\n\ndef make():\n    return torch.nn.Linear(3, 5)\n'
    (tmp_path / "one_linear.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(["inspect", "one_linear:make"]) == 2
    assert "inputs are needed" in capsys.readouterr().err
