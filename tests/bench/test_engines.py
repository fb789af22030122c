"""Do processes of engines answer in turn, and is what they say told apart from what is wrong?"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.bench.engines import __main__ as command
from tests.bench.engines import process
from tests.bench.engines.process import Failed, Process
from tests.peers import environments

FAKE = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from tests.bench.engines.worker import main

    class Counting:
        def prefill(self, tokens):
            print("libraries write to the standard output")
            return self.step(tokens[-1])

        def step(self, token):
            if token == 7:
                sys.exit("seven is too much")
            return token + 1

    def load(variant, path, threads, room):
        assert (variant, path, threads, room) == ("plain", Path("model"), 2, 9)
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
def test_an_engine_answers_in_turn_and_says_why_it_failed() -> None:
    engine = Process("counting", "plain", Path("model"), 2, 9)
    try:
        assert engine.load >= 0
        answer = engine.ask({"prompt": [1, 2], "follow": [5, 3]})
        assert answer["says"] == [3, 6, 4]
        assert answer["megabytes"] >= 0
        timed = engine.ask({"prompt": [1], "tokens": 3})
        assert timed["first"] > 0
        assert timed["next"] == 2
        assert len(timed["each"]) == 3
        with pytest.raises(Failed, match="seven is too much"):
            engine.ask({"prompt": [7], "tokens": 0})
    finally:
        engine.end()


@pytest.mark.usefixtures("counting")
def test_a_conversion_is_kept_and_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    out = process.converted("counting", "plain", "some", tmp_path)
    assert out.read_text() == "plain"
    out.write_text("kept")
    assert process.converted("counting", "plain", "some", tmp_path).read_text() == "kept"
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
    python = tmp_path / "one" / "bin" / "python"
    assert not (tmp_path / "one" / "installed").exists()
    (tmp_path / "one" / "installed").touch()
    assert environments.on_top("one", ["not a name"]) == python
    code = "import torch; print(torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == torch.__version__


class Said:
    """A process that counts, and token by token says what it is told to."""

    load = 1.0

    def __init__(self, step: int) -> None:
        self.step = step
        self.ended = False

    def ask(self, what: dict[str, list[int]]) -> dict[str, object]:
        first = what["prompt"][-1] + 1
        if "follow" in what:
            return {"says": [first, *(token + self.step for token in what["follow"])]}
        return {"next": first, "first": 0.25, "each": [0.5], "megabytes": 3}

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(("step", "writes"), [(1, True), (2, False)])
def test_what_is_wrong_token_by_token_is_timed_on_prompts_alone(
    step: int, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "Process", lambda *_: Said(step))
    text = list(range(command.PROMPT + command.FOLLOWED))
    right = command.Says.of(Said(1), text)
    assert len(right.prompts) == command.PROMPTS
    assert right.following == [*text[command.PROMPT :], len(text)]
    row = command.Row("torch", "some")
    running, waiting = command._started([row], {row.name: Path()}, Path(), 1, text, right)
    assert (running, waiting) == ([row], [])
    command._rounds(running, text[: command.PROMPT], 3, float("inf"))
    assert row.result()["prefill"] == [command.PROMPT / 0.25] * 3
    assert row.result()["decode"] == [2.0] * 3 * writes


def test_an_engine_that_reads_prompts_wrong_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Process", lambda *_: Said(1))
    text = list(range(command.PROMPT + command.FOLLOWED))
    wrong = command.Says([0] * command.PROMPTS, text[command.PROMPT - 1 :])
    row = command.Row("torch", "some")
    assert command._started([row], {row.name: Path()}, Path(), 1, text, wrong) == ([], [])
    assert "torch some: left out" in capsys.readouterr().out
    assert row.process.ended


def test_without_memory_rows_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Process", lambda *_: Said(1))
    monkeypatch.setattr(command, "_available", lambda: -1.0)
    rows = [command.Row("torch", "one"), command.Row("torch", "two")]
    forms = {row.name: Path() for row in rows}
    text = list(range(command.PROMPT + command.FOLLOWED))
    running, waiting = command._started(rows, forms, Path("nowhere"), 1, text, None)
    assert (running, waiting) == (rows[:1], rows[1:])


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
    assert started == ["qpass w4a8", "qpass w8a8", "bfloat16"]
    assert "openvino int4, 1.1B: left out: it does not install" in shown
    assert "decode: qpass w4a8 is 1.00 times as fast as torch bfloat16" in shown
    command.main()
    assert len(started) == 3
    assert "torch bfloat16" in capsys.readouterr().out


def test_the_table_names_the_best_of_each_side(capsys: pytest.CaptureFixture[str]) -> None:
    def result(decode: float, prefill: float) -> dict[str, object]:
        return {
            "decode": [decode, decode * 1.5, decode * 2],
            "prefill": [prefill] * 3,
            "agreed": None,
            "megabytes": 10,
            "load": 1.0,
        }

    known = {
        "1.1B, qpass w4a8": result(20, 100),
        "1.1B, qpass w8a8": result(10, 300),
        "1.1B, torch bfloat16": result(5, 200),
        "1.1B, llamacpp Q4_0": result(16, 50),
        "another, llamacpp Q8_0": result(1000, 1000),
    }
    shown = command.table("1.1B", known)
    assert [row[:3] for row in shown.rows] == [
        ("qpass w4a8", 30.0, pytest.approx(2 / 3)),
        ("qpass w8a8", 15.0, pytest.approx(2 / 3)),
        ("torch bfloat16", 7.5, pytest.approx(2 / 3)),
        ("llamacpp Q4_0", 24.0, pytest.approx(2 / 3)),
    ]
    decode, prefill = command.ratios("1.1B", known)
    assert decode.startswith("decode: qpass w4a8 is 1.25 times as fast as llamacpp Q4_0;")
    assert prefill.startswith("prefill: qpass w8a8 is 1.50 times as fast as torch bfloat16;")
    assert command.ratios("1.1B", {"1.1B, qpass w4a8": result(1, 1)}) == []


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.engines", "--peers", "torch,abacus"],
        cwd=process.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no engine abacus" in done.stderr
