"""Where is finished work kept, so that a run that was stopped goes on where it was?"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers as hf

from examples.demo.rows import ROWS
from examples.demo.settings import ROOT, Settings
from qpass.report import json_text
from qpass.runtime import native
from qpass.verify import Score

MARK = "settings.json"


@dataclass(frozen=True, slots=True)
class Store:
    """A folder for one state of the code and the inputs."""

    folder: Path

    def done(self, name: str, make: Callable[[Path], None]) -> Path:
        """The file or folder `name`; `make` makes it under another name if it is not there."""
        made = self.folder / name
        if not made.exists():
            partial = self.folder / f"{name}.partial"
            if partial.is_dir():
                shutil.rmtree(partial)
            make(partial)
            partial.rename(made)
        return made

    def scores(self, row: str) -> dict[int, Score]:
        """The finished windows of a row, by number."""
        file = self._scores(row)
        lines = file.read_text().splitlines() if file.exists() else []
        # a line that was cut off by the end of a run is measured again
        entries = [json.loads(line) for line in lines if line.endswith("}}")]
        return {entry["window"]: Score(**entry["score"]) for entry in entries}

    def add_score(self, row: str, window: int, score: Score) -> None:
        with self._scores(row).open("a") as file:
            file.write("\n" + json.dumps({"window": window, "score": asdict(score)}))

    def _scores(self, row: str) -> Path:
        return self.folder / f"{row}.scores.jsonl"


def open_store(settings: Settings) -> Store:
    """The store for this code and these inputs; those of other code are removed."""
    folder = settings.output / _digest(settings)[:16]
    for old in settings.output.glob(f"*/{MARK}"):
        if old.parent != folder:
            shutil.rmtree(old.parent)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json_text(settings))
    return Store(folder)


def _digest(settings: Settings) -> str:
    facts = (settings, ROWS, torch.__version__, hf.__version__, native.load())
    digest = hashlib.sha256(repr(facts).encode())
    code = [path for name in ("qpass", "kernels", "examples") for path in (ROOT / name).rglob("*")]
    inputs = [settings.text, settings.calibration, *settings.model.glob("*")]
    for path in sorted(path for path in [*code, *inputs] if path.is_file()):
        if path.suffix == ".pyc":
            continue
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
