"""Do processes of engines answer in turn, and is what they say told apart from what is wrong?"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.bench.engines import __main__ as command
from tests.bench.engines import process, rows, tables
from tests.bench.engines.process import Failed, Process
from tests.bench.engines.says import Says
from tests.bench.engines.worker import Setting
from tests.peers import environments

FAKE = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    from tests.bench.engines.worker import Setting, main

    class Counting:
        def prefill(self, prompts):
            print("libraries write to the standard output")
            return self.step([tokens[-1] for tokens in prompts])

        def step(self, tokens):
            if 7 in tokens:
                sys.exit("seven is too much")
            return np.eye(9)[[token + 1 for token in tokens]]

    def load(variant, path, setting):
        assert (variant, path, setting) == ("plain", Path("model"), Setting(2, 9, 2, 4))
        return Counting()

    main(load, lambda variant, checkpoint, out: out.write_text(variant))
    """
)


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that counts, which runs in this environment."""
    path = tmp_path / "by_counting.py"
    path.write_text(FAKE)
    monkeypatch.setattr(process, "WHERE", tmp_path)
    monkeypatch.setattr(process, "_module", lambda engine: f"by_{engine}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("counting")
def test_an_engine_answers_in_turn_and_says_why_it_failed(tmp_path: Path) -> None:
    engine = Process("counting", "plain", Path("model"), Setting(2, 9, 2, 4))
    try:
        assert engine.load >= 0
        save = tmp_path / "scores.npy"
        answer = engine.ask({"prompt": [1, 2], "follow": [5, 3], "save": str(save)})
        assert np.load(save).argmax(1).tolist() == [3, 6, 4]
        assert answer["megabytes"] >= 0
        timed = engine.ask({"prompts": [[1], [4]], "tokens": 2})
        assert timed["first"] > 0
        assert timed["next"] == [2, 5]
        assert len(timed["each"]) == 2
        with pytest.raises(Failed, match="seven is too much"):
            engine.ask({"prompts": [[7]], "tokens": 0})
    finally:
        engine.end()


@pytest.mark.usefixtures("counting")
def test_a_conversion_is_kept_and_one_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = process.converted("counting", "plain", "some", tmp_path)
    assert out.read_text() == "plain"
    out.write_text("kept")
    assert process.converted("counting", "plain", "some", tmp_path).read_text() == "kept"
    # what this checkout makes is made anew
    monkeypatch.setattr(process, "_module", lambda _: "by_counting")
    ours = process.converted("qpass", "plain", "own", tmp_path)
    ours.write_text("of another day")
    assert process.converted("qpass", "plain", "own", tmp_path).read_text() == "plain"
    monkeypatch.setattr(process, "_module", lambda engine: f"by_{engine}")
    (tmp_path / "by_broken.py").write_text("raise ValueError('no such model')")
    with pytest.raises(Failed, match="no such model"):
        process.converted("broken", "plain", "some", tmp_path)
    assert list((tmp_path / "models" / "some").iterdir()) == [out]


def test_the_environment_below_is_seen_and_installed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "WHERE", tmp_path)
    # pip checks names before it looks for anything
    with pytest.raises(subprocess.CalledProcessError) as failed:
        environments.on_top("one", ["not a name"])
    assert "not a name" in environments.last_line(failed.value)
    killed = subprocess.CalledProcessError(-9, "", stderr="WARNING: nothing of importance")
    assert environments.last_line(killed).startswith("ended by signal 9, which memory")
    python = tmp_path / "one" / "bin" / "python"
    assert not (tmp_path / "one" / "installed").exists()
    (tmp_path / "one" / "installed").touch()
    assert environments.on_top("one", ["not a name"]) == python
    code = "import torch; print(torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == torch.__version__


SIZE = 1000


class Said:
    """A process that counts, and token by token says what it is told to."""

    load = 1.0

    def __init__(self, step: int) -> None:
        self.step = step
        self.ended = False

    def ask(self, what: dict[str, Any]) -> dict[str, object]:
        if "follow" in what:
            said = [what["prompt"][-1] + 1, *(token + self.step for token in what["follow"])]
            np.save(what["save"], 9 * np.eye(SIZE, dtype=np.float32)[said])
            return {}
        after = [tokens[-1] + 1 for tokens in what["prompts"]]
        return {"next": after, "first": 0.25, "each": [0.5], "megabytes": 3}

    def end(self) -> None:
        self.ended = True


TEXT = list(range(rows.FIRST.prompt + command.FOLLOWED))


def says(step: int) -> Says:
    return Says.of(Said(step), TEXT, rows.FIRST.prompt, command.PROMPTS)


def started(asked: list[rows.Row], want: Says | None) -> tuple[list[rows.Row], list[rows.Row]]:
    forms = {row.name: Path() for row in asked}
    return command._started(asked, forms, Path("nowhere"), Setting(1, SIZE), TEXT, want)


@pytest.mark.parametrize(("step", "writes"), [(1, True), (2, False)])
def test_what_is_wrong_token_by_token_is_timed_on_prompts_alone(
    step: int, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Process", lambda *_: Said(step))
    right = says(1)
    assert len(right.prompts) == command.PROMPTS
    assert right.scores_tv.argmax(1).tolist() == [*right.text, len(TEXT)]
    row = rows.Row("torch", "some")
    assert started([row], right) == ([row], [])
    command._rounds([row], rows.FIRST, TEXT, 3, float("inf"))
    result = row.result(rows.FIRST)
    assert result["prefill"] == [rows.FIRST.prompt / 0.25] * 3
    assert result["decode"] == [2.0] * 3 * writes
    many = dataclasses.replace(rows.FIRST, batch=4)
    assert row.result(many)["prefill"] == [4 * rows.FIRST.prompt / 0.25] * 3


def test_what_is_lost_is_against_the_float_model() -> None:
    generator = torch.Generator().manual_seed(0)
    want, got = (torch.randn(5, 7, generator=generator) for _ in "ab")
    text = [3, 1, 4, 1]
    lost = Says([1, 2, 3], text, got).lost(Says([1, 2, 4], text, want))
    p, q = (torch.distributions.Categorical(logits=scores) for scores in (want, got))
    assert lost.at_once == pytest.approx(2 / 3)
    assert lost.kl == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()))
    loss = torch.nn.functional.cross_entropy
    ours, theirs = (float(loss(scores[:4], torch.tensor(text))) for scores in (got, want))
    assert lost.perplexity == pytest.approx(math.exp(ours - theirs), rel=1e-5)
    assert lost.agreed == float((got.argmax(1) == want.argmax(1)).double().mean())


def test_an_engine_that_reads_prompts_wrong_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Process", lambda *_: Said(1))
    wrong = dataclasses.replace(says(1), prompts=[0] * command.PROMPTS)
    row = rows.Row("torch", "some")
    assert started([row], wrong) == ([], [])
    assert "torch some: left out" in capsys.readouterr().out
    assert row.process.ended


def test_without_memory_rows_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Process", lambda *_: Said(1))
    monkeypatch.setattr(command, "_available", lambda: -1.0)
    two = [rows.Row("torch", "one"), rows.Row("torch", "two")]
    assert started(two, None) == (two[:1], two[1:])


def test_rows_are_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def start(engine: str, variant: str, *_: object) -> Said:
        started.append(variant)
        return Said(1)

    def converted(engine: str, *_: object) -> Path:
        if engine == "openvino":
            raise Failed("it does not install")
        return tmp_path

    monkeypatch.setattr(command, "Process", start)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "converted", converted)
    monkeypatch.setattr(command, "STORE", tmp_path / "store.jsonl")
    monkeypatch.setattr(command.models, "checkpoint", lambda _: tmp_path)
    peers = ["--peers", "qpass torch,openvino"]
    monkeypatch.setattr(sys, "argv", ["", *peers, "--models", "1.1B", "--rounds", "2"])
    command.main()
    shown = capsys.readouterr().out
    every = ["w4a8", "w8a8", "bfloat16"]
    assert started == every * (1 + len(rows.FURTHER))
    assert "openvino int4, 1.1B: left out: it does not install" in shown
    assert "decode: qpass w4a8 is 1.00 times as fast as torch bfloat16; the target" in shown
    assert "1.1B 8 at once: " in shown
    command.main()
    assert len(started) == len(every) * (1 + len(rows.FURTHER))
    assert "torch bfloat16" in capsys.readouterr().out


def result(decode: float, prefill: float) -> dict[str, object]:
    return {
        "decode": [decode, decode * 1.5, decode * 2],
        "prefill": [prefill] * 3,
        "first": [0.5] * 3,
        "lost": None,
        "megabytes": 10,
        "load": 1.0,
    }


def test_the_table_names_the_best_of_each_side() -> None:
    known = {
        "1.1B, qpass w4a8": result(20, 100),
        "1.1B, qpass w8a8": result(10, 300),
        "1.1B, torch bfloat16": result(5, 200),
        "1.1B, llamacpp Q4_0": result(16, 50),
        "1.1B, llamacpp Q8_0": result(12, 70),
        "1.1B, openvino int4": result(1, 70),
        "another, llamacpp Q8_0": result(1000, 1000),
    }
    shown = tables.table("1.1B", rows.FIRST, known)
    assert [row[:3] for row in shown.rows] == [
        ("qpass w4a8", 30.0, pytest.approx(2 / 3)),
        ("qpass w8a8", 15.0, pytest.approx(2 / 3)),
        ("torch bfloat16", 7.5, pytest.approx(2 / 3)),
        ("openvino int4", 1.5, pytest.approx(2 / 3)),
        ("llamacpp Q4_0", 24.0, pytest.approx(2 / 3)),
        ("llamacpp Q8_0", 18.0, pytest.approx(2 / 3)),
    ]
    decode, prefill = tables.ratios("1.1B", rows.FIRST, known)
    assert decode.startswith("decode: qpass w4a8 is 1.25 times as fast as llamacpp Q4_0;")
    assert prefill.startswith("prefill: qpass w8a8 is 1.50 times as fast as torch bfloat16;")
    assert tables.ratios("1.1B", rows.FIRST, {"1.1B, qpass w4a8": result(1, 1)}) == []
    best = [("llamacpp", "Q4_0"), ("torch", "bfloat16")]
    assert tables.best_others("1.1B", known, 2) == best


def test_a_rescaled_model_is_measured_in_eight_bits() -> None:
    found = command._names("SmolLM2-135M rescaled", rows.FIRST, list(rows.ROWS), {})
    assert {variant for _, variant in found} == set(rows.EIGHT_BITS)
    assert command._cases("SmolLM2-135M rescaled") == (rows.FIRST,)


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.engines", "--peers", "torch,abacus"],
        cwd=process.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no engine abacus" in done.stderr
