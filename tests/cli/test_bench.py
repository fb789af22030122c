"""Does `qpass bench` time what it is given?"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qpass.cli.main import run
from tests.zoo import specimen

QUICK = ("--eager", "--prompt", "5", "--tokens", "2", "--repetitions", "1")


def save(name: str, folder: Path) -> str:
    specimen(name).build(0).to(torch.float32).save_pretrained(folder)
    return str(folder)


def test_two_models_side_by_side(tmp_path: Path, capsys) -> None:
    one, two = save("llama", tmp_path / "one"), save("gpt2", tmp_path / "two")
    assert run(["bench", one, "--reference", two, *QUICK, "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed.keys() == {one, two}
    assert all(found["prefill"] > 0 and found["decode"] > 0 for found in speed.values())
    assert run(["bench", one, *QUICK]) == 0
    assert "decode tokens/s" in capsys.readouterr().out


def test_a_model_that_writes_no_tokens_is_refused(tmp_path: Path, capsys) -> None:
    assert run(["bench", save("bert", tmp_path), *QUICK]) == 2
    assert "does not write tokens" in capsys.readouterr().err
