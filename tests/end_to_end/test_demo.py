"""Does the demo measure every row, and does a run that was stopped go on where it was?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.demo.__main__ import COLUMNS, main
from examples.demo.rows import ROWS
from examples.demo.settings import Settings, read
from examples.demo.store import Store, open_store
from qpass.verify import Score
from tests.end_to_end import tiny_model

SCORE = Score(9, 20.0, 19.0, 10, 0.5, 8, 0)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tiny_model.save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_model.text(100))
    (tmp_path / "other.txt").write_text(tiny_model.text(160))
    given = {
        "model": tmp_path / "model",
        "text": tmp_path / "text.txt",
        "calibration": tmp_path / "other.txt",
        "output": tmp_path / "out",
        "tail": 90,
        "length": 16,
        "windows": 3,
        "new-tokens": 2,
        "repetitions": 1,
    }
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture
def settings(arguments: list[str]) -> Settings:
    return read(arguments)


def test_windows_are_spread_over_the_end_of_the_text(settings: Settings) -> None:
    ids = torch.tensor([(at * at + 3 * at) % (tiny_model.WORDS - 1) + 1 for at in range(10, 100)])
    every = ids[:80].reshape(5, 16)
    assert torch.equal(settings.evaluation(), every[[0, 2, 4]])


def test_scores_survive_and_a_cut_line_does_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.scores("row") == {}
    store.add_score("row", 0, SCORE)
    store.add_score("row", 1, SCORE)
    file = tmp_path / "row.scores.jsonl"
    file.write_text(file.read_text()[:-10])
    assert store.scores("row") == {0: SCORE}
    store.add_score("row", 1, SCORE)
    assert store.scores("row") == {0: SCORE, 1: SCORE}


def test_finished_work_is_not_made_again(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "part").touch()
        if len(made) == 1:
            raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.done("work", make)
    assert not (tmp_path / "work").exists()
    for _ in range(2):
        assert [file.name for file in store.done("work", make).iterdir()] == ["part"]
    assert len(made) == 2


def test_other_inputs_open_another_store(settings: Settings) -> None:
    first = open_store(settings)
    assert open_store(settings) == first
    settings.text.write_text("w1 " * 100)
    second = open_store(settings)
    assert second != first
    assert not first.folder.exists()


@pytest.mark.slow
def test_every_row_is_measured(
    arguments: list[str], settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments)
    printed = capsys.readouterr().out
    results = json.loads((settings.output / "results.json").read_text())
    assert [row["model"] for row in results["table"]] == [row.name for row in ROWS]
    for row, cells in zip(ROWS, results["table"], strict=True):
        assert row.name in printed
        unmeasured = [name for name in COLUMNS if cells[name] is None]
        assert unmeasured == ([] if row.timed else list(COLUMNS[-2:]))
    quality = {name: found["evaluation"] for name, found in results["quality"].items()}
    assert quality["float32"]["kl"]["value"] == 0
    assert 0 < quality["w8a8"]["kl"]["value"] < quality["w4a4"]["kl"]["value"]
    assert quality["w4a8"]["megabytes"] < quality["w8a8"]["megabytes"]
    # a second run has nothing left to do, and says the same
    before = (settings.output / "results.json").read_text()
    main(arguments)
    assert (settings.output / "results.json").read_text() == before
