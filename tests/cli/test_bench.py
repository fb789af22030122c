"""Does `qpass bench` time what it is given?"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qpass.cli.main import run
from qpass.engines import ENGINES
from tests.zoo import specimen

QUICK = (
    *("--eager", "--prompt", "5", "--tokens", "2", "--repetitions", "1"),
    *("--seconds", "0.001", "--largest", "1"),
)


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


def test_the_machine_alone(capsys) -> None:
    assert run(["bench", *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"threads", "torch", "machine"}
    assert found["machine"]["limits"][-1]["threads"] == found["threads"]
    assert run(["bench", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("what the machine can do")
    assert "float32, Tops/s" in shown


def test_products_of_a_prompt_and_of_a_token(tmp_path: Path, capsys) -> None:
    one = save("llama", tmp_path)
    assert run(["bench", one, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    products = found["products"][one]
    assert products.keys() == {"1", "5"}
    for length, several in products.items():
        assert {p["tokens"] for p in several} <= {1, int(length)}
        assert all(p["microseconds"] > 0 and p["fraction"] > 0 for p in several)
    assert found["allowed"][one]["decode"] > 0
    assert found["allowed"][one]["prefill"] > found["allowed"][one]["decode"]
    assert run(["bench", one, *QUICK]) == 0
    assert "of the limit" in capsys.readouterr().out


def test_float_models_run_in_bfloat16_too(tmp_path: Path, capsys) -> None:
    one = save("llama", tmp_path / "one")
    assert run(["bench", one, *QUICK, "--peers", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    # what else is timed depends on what is installed
    others = {f"{one} in {engine.name}" for engine in ENGINES}
    assert speed.keys() - others == {one, f"{one} in bfloat16"}
    assert run(["quantize", one, "-r", "w8a8", "-o", str(tmp_path / "two")]) == 0
    assert run(["bench", str(tmp_path / "two"), *QUICK, "--peers"]) == 2
    assert "--reference" in capsys.readouterr().err
    assert run(["bench", str(tmp_path / "two"), "--reference", one, *QUICK, "--peers"]) == 0
    assert f"{one} in bfloat16" in capsys.readouterr().out


def test_a_model_that_writes_no_tokens_is_refused(tmp_path: Path, capsys) -> None:
    assert run(["bench", save("bert", tmp_path), *QUICK]) == 2
    assert "does not write tokens" in capsys.readouterr().err
