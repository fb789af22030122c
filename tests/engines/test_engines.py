"""Do other engines write what the model writes, and is what cannot be timed said?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from qpass.cli.main import run
from qpass.engines import ENGINES, Source, opened
from qpass.hf.speed import Reader, measure
from tests.cli.test_bench import QUICK, save
from tests.hf.test_speed import model
from tests.zoo import tokens


class Counting(Reader):
    """It says that the number after the last comes next."""

    def forget(self) -> None:
        pass

    def next(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, -1:] + 1


def sure(seed: int = 0) -> hf.PreTrainedModel:
    """A model whose likeliest token is likelier than others by more than eight bits take away."""
    found = model(seed)
    with torch.no_grad():
        found.get_output_embeddings().weight.mul_(30)
    return found


def test_installed_engines_write_what_the_model_writes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    own, prompt = sure(), tokens(1, 9)
    with opened({"one": own}, room=20, threads=1) as (found, left):
        assert {*found, *left} == {f"one in {engine.name}" for engine in ENGINES}
        assert "one in ONNX Runtime int8" in found
        speeds = measure(
            {"own": own, **found}, prompt, new_tokens=8, repetitions=2,
            progress=lambda *_: None,
        )  # fmt: skip
    for name, speed in speeds.items():
        assert speed.written == speeds["own"].written, name
        assert speed.decode > 0


def test_readers_and_models_take_turns() -> None:
    found = measure(
        {"own": model(0), "other": Counting()}, tokens(1, 5), new_tokens=3, repetitions=1,
        progress=lambda *_: None,
    )  # fmt: skip
    first = int(tokens(1, 5)[0, -1])
    assert found["other"].written == tuple(range(first + 1, first + 5))


def test_what_is_missing_or_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, needs, installed = "broken", (), True

        def open(self, source: Source) -> Reader:
            raise RuntimeError("it reads\nnothing")

    class Absent(Broken):
        name, needs, installed = "absent", ("nowhere",), False

    monkeypatch.setattr("qpass.engines.base.ENGINES", [Broken(), Absent()])
    with opened({"one": model(0)}, room=20, threads=1) as (found, left):
        assert found == {}
    assert left == {"one in broken": "it reads", "one in absent": "nowhere: not installed"}


def test_a_gguf_file_is_known_by_its_name(tmp_path: Path) -> None:
    source = Source("a/model.gguf", model(0), tmp_path, 20, 1)
    assert source.gguf == Path("a/model.gguf")
    other = dataclasses.replace(source, name="a/model")
    assert other.gguf is None
    assert ENGINES["llama.cpp"].open(other) is None


def test_the_command_times_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    one = save("llama", tmp_path)
    assert run(["bench", one, *QUICK, "--peers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speed"][f"{one} in ONNX Runtime int8"]["decode"] > 0
    assert f"{one} in llama.cpp" in found["left"]
    assert run(["bench", one, *QUICK, "--peers"]) == 0
    assert "not timed" in capsys.readouterr().out
