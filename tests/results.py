"""Where long measurements keep what is finished: one JSON line for each result and version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers as hf

ROOT = Path(__file__).parents[1]


class Results:
    """Results by name in a file, of which those of other code do not count.

    `more` are the files, beside the package, that a result depends on.
    """

    def __init__(self, path: Path, *more: Path) -> None:
        self._path = path
        digest = hashlib.sha256(f"{torch.__version__} {hf.__version__}".encode())
        for source in (*sorted((ROOT / "qpass").rglob("*.py")), *more):
            digest.update(source.read_bytes())
        self.version = digest.hexdigest()[:16]

    def read(self, *, stale: bool = False) -> dict[str, dict[str, object]]:
        """The last result of each name; with `stale`, of any code."""
        return dict(self._lines(stale))

    def add(self, name: str, result: dict[str, object]) -> None:
        """Keep a result from now on."""
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            entry = {"version": self.version, "name": name, "result": result}
            file.write(json.dumps(entry) + "\n")

    def _lines(self, stale: bool) -> Iterator[tuple[str, dict[str, object]]]:
        if not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if stale or entry["version"] == self.version:
                yield entry["name"], entry["result"]
