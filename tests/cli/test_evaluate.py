"""Does `qpass eval` compare two models, and fail where a gate says so?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qpass.cli.main import run
from tests.data.fetch import MODEL
from tests.zoo import tiny

WORDS = " ".join(f"number {n}" for n in range(100))

needs_tokenizer = pytest.mark.skipif(
    not MODEL.exists(), reason="python -m tests.data.fetch has not run"
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    """Two models that differ a little, with a real tokenizer, and a text."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    for name in ("reference", "model"):
        model = tiny(config, dtype=torch.float32)
        if name == "model":
            with torch.no_grad():
                model.lm_head.weight.mul_(1.01)
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / file, tmp_path / name)
    (tmp_path / "text.txt").write_text(WORDS)
    return str(tmp_path / "model"), str(tmp_path / "reference"), str(tmp_path / "text.txt")


@needs_tokenizer
def test_quality_and_gates(files: tuple[str, str, str], capsys) -> None:
    model, reference, text = files
    options = ["--text", text, "--length", "16", "--windows", "3"]
    assert run(["eval", model, "--reference", reference, *options, "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["windows"] == 3
    assert quality["kl"]["value"] > 0
    loose, strict = ("--gate", "kl=1"), ("--gate", "kl=1e-9", "--gate", "agreement=0.1")
    assert run(["eval", model, "--reference", reference, *options, *loose]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert run(["eval", model, "--reference", reference, *options, *strict]) == 1
    captured = capsys.readouterr()
    assert "gate failed: kl" in captured.err
    assert "agreement" not in captured.err


def test_a_wrong_gate_and_a_wrong_text_exit_with_2(tmp_path: Path, capsys) -> None:
    text = str(tmp_path / "absent.txt")
    assert run(["eval", "m", "--reference", "r", "--text", text, "--gate", "kll=1"]) == 2
    assert "did you mean 'kl'" in capsys.readouterr().err
    assert run(["eval", "m", "--reference", "r", "--text", text]) == 2
    assert "absent.txt" in capsys.readouterr().err


@needs_tokenizer
def test_the_cost_of_each_site(files: tuple[str, str, str], capsys, tmp_path: Path) -> None:
    _, reference, text = files
    changed = str(tmp_path / "changed")
    assert run(["quantize", reference, "-r", "w8a16", "-o", changed]) == 0
    options = ["--reference", reference, "--text", text, "--length", "16", "--windows", "3"]
    capsys.readouterr()
    assert run(["eval", changed, *options, "--sites", "measured"]) == 0
    shown = capsys.readouterr().out
    assert "predicted KL" in shown
    assert "model.layers.0.mlp.down_proj.weight" in shown
    assert run(["eval", changed, *options, "--sites", "predicted", "--json"]) == 0
    budget = json.loads(capsys.readouterr().out)["quality"]["budget"]
    assert len(budget["sites"]) == 9
    assert budget["measured"] is None
    assert run(["eval", reference, *options, "--sites", "predicted"]) == 2
    assert "not quantized" in capsys.readouterr().err


@needs_tokenizer
def test_multiple_choice(files: tuple[str, str, str], capsys, tmp_path: Path) -> None:
    model, reference, _ = files
    lines = [
        {"context": f"number {n} and", "choices": [" one", " two"], "answer": n % 2}
        for n in range(4)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(map(json.dumps, lines)))
    options = ["--reference", reference, "--tasks", str(task), "--limit", "3"]
    assert run(["eval", model, *options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tasks"]
    assert [row["metric"] for row in rows] == ["acc", "acc_norm"]
    assert all(row[model] == row[reference] for row in rows)
    assert run(["eval", model, *options]) == 0
    assert "acc_norm" in capsys.readouterr().out
    assert run(["eval", model, "--reference", reference]) == 2
    assert "nothing to measure on" in capsys.readouterr().err
    assert run(["eval", model, *options, "--gate", "kl=1"]) == 2
    assert "--text" in capsys.readouterr().err
