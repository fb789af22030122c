"""`make accuracy-peers`: other tools and qpass on one model and the same tokens, kept as it goes.

Each tool lives in an environment of its own under `.data/peers`, made when it is first asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from qpass.report.table import Table
from tests.accuracy import language
from tests.accuracy.grid import recipe
from tests.data.fetch import MODEL
from tests.peers.environments import WHERE, alone
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "peers.jsonl"
HERE = Path(__file__).parent
SAMPLES, EVERY = 32, 6
# the tool's module here, and what installs it
PEERS = {
    "hqq": ("by_hqq", ("hqq==0.2.8.post1", "transformers", "accelerate")),
    "autoround": ("by_autoround", ("auto-round==0.16.1",)),
    "llmcompressor": ("by_llmcompressor", ("llmcompressor==0.14.0.1",)),
    "brevitas": (
        "by_brevitas",
        (
            "brevitas==0.13.4", "transformers", "optimum", "accelerate", "datasets", "onnx",
            "onnxscript", "onnxoptimizer", "gguf", "numexpr", "pandas",
        ),
    ),
}  # fmt: skip
# by setting, the methods of the grid of which the best on calibration text is qpass's row
OWN = {
    "W8A8": "rotated, rounding",
    "W4A8": "rotated, rounding",
    "W4A4": "rotated, rounding",
}


@dataclass(frozen=True)
class Row:
    """A tool, and the setting that it is asked for."""

    tool: str
    setting: str

    @property
    def name(self) -> str:
        return f"{self.tool}, {self.setting}"


def main() -> None:
    """Measure what has not been measured yet, then print all of it."""
    parser = argparse.ArgumentParser(prog="make accuracy-peers", description=__doc__)
    parser.add_argument("--peer", action="append", choices=[*PEERS, "qpass"], help="only these")
    parser.add_argument("--setting", action="append", help="only these")
    parser.add_argument("--minutes", type=float, default=120.0, help="then no other row is begun")
    parser.add_argument("--stale", action="store_true", help="results of other code count too")
    given = parser.parse_args()
    tokens = _tokens()
    store = Results(STORE, *sorted(HERE.glob("*.py")))
    known = store.read(stale=given.stale)
    start = time.monotonic()
    rows = list(_rows(given, tokens))
    for row in rows:
        if row.name in known or time.monotonic() - start > 60 * given.minutes:
            continue
        known[row.name] = _own(row) if row.tool == "qpass" else _peer(row, tokens)
        store.add(row.name, known[row.name])
        print(f"{row.name}: {json.dumps(known[row.name])}", flush=True)  # noqa: T201
    print(_table(rows, known).text())  # noqa: T201
    if left := sum(row.name not in known for row in rows):
        print(f"{left} of {len(rows)} rows are not measured yet: run it again")  # noqa: T201


def _tokens() -> Path:
    found = {
        "calibration": torch.cat(list(language.calibration(SAMPLES))),
        "evaluation": torch.cat(list(language.evaluation(EVERY))),
    }
    WHERE.mkdir(parents=True, exist_ok=True)
    save_file(found, WHERE / "tokens.safetensors")
    return WHERE / "tokens.safetensors"


def _rows(given: argparse.Namespace, tokens: Path) -> list[Row]:
    """What each tool supports, and qpass wherever one of them does."""
    tools = given.peer or [*PEERS, "qpass"]
    rows = [
        Row(tool, setting)
        for tool in tools
        if tool != "qpass"
        for setting in json.loads(_run(tool, tokens, "", "--list"))
        if setting in (given.setting or [setting])
    ]
    settings = dict.fromkeys(row.setting for row in rows) or dict.fromkeys(given.setting or ())
    return rows + [Row("qpass", s) for s in settings if "qpass" in tools]


def _peer(row: Row, tokens: Path) -> dict[str, object]:
    try:
        return json.loads(_run(row.tool, tokens, row.setting))
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        return {"failed": " ".join(last)}


def _own(row: Row) -> dict[str, object]:
    method = OWN.get(row.setting, "rounding")
    found = language.TASK.measured(recipe(row.setting, method, 0), SAMPLES, EVERY)
    return {**found.values, "seconds": found.seconds, "how": f"{method}, {SAMPLES} samples"}


def _run(tool: str, tokens: Path, *arguments: str) -> str:
    """The last line that a tool's module prints, in the tool's environment."""
    module = PEERS[tool][0]
    command = [
        alone(tool, PEERS[tool][1]),
        "-m",
        f"tests.peers.{module}",
        MODEL,
        tokens,
        *arguments,
    ]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, env=quiet, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


def _table(rows: list[Row], known: dict[str, dict[str, object]]) -> Table:
    lines: list[tuple[object, ...]] = []
    for row in sorted(rows, key=lambda row: row.setting):
        if found := known.get(row.name):
            numbers = (found.get(k, "-") for k in ("KL", "perplexity", "top-1", "seconds"))
            lines.append((row.setting, row.tool, *numbers, found.get("how", found.get("failed"))))
    columns = ("setting", "tool", "KL", "perplexity", "top-1", "seconds", "how")
    return Table(f"{SAMPLES} calibration samples, every sixth window", columns, tuple(lines))


if __name__ == "__main__":
    main()
