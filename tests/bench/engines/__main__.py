"""`make bench-peers`: how fast qpass and other engines read prompts and write tokens, in turn.

Each engine lives in an environment of its own under `.data/peers`; models in its form and what was
measured are kept there too. One process for each row stands still while another runs.
"""

# ruff: noqa: T201 - a command's output

from __future__ import annotations

import argparse
import functools
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.engines import models
from tests.bench.engines.process import Failed, Process, converted
from tests.bench.engines.rows import EIGHT_BITS, FIRST, FURTHER, ROWS, Case, Row
from tests.bench.engines.says import Says
from tests.bench.engines.tables import Known, best_others, ratios, table
from tests.bench.engines.worker import Setting
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "bench-peers.jsonl"
# tokens that are written in a round
WRITTEN = 24
# so many tokens follow in a text, at each of which an engine scores what may come next
FOLLOWED = 128
# so many prompts of that text are read at once for the same question
PROMPTS = 8
# a row that says other tokens than the float model more often than this computes something else
# (4-bit weights change up to a third of what a small model says)
LEAST_AGREED = 0.5
# another model is started while there is memory for so many of its checkpoints
ROOM = 2.0
# so many of the others are measured further
BEST = 2
FLOAT = ("torch", "float32")


def main() -> None:
    """Measure the rows that are not known yet, side by side, then print all of them."""
    given = _arguments()
    # what stands still would stay for ever: leave by the way that ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sources = (*Path(__file__).parent.glob("*.py"), *(ROOT / "kernels" / "cpu").glob("*.[ch]pp"))
    store = Results(STORE, *sorted(sources))
    asked = [(model, case) for model in given.models for case in _cases(model)]
    for model, case in asked:
        known = store.read()
        rows = [Row(*names) for names in _names(model, case, given.peers, known)]
        done = {} if given.fresh else known
        missing = [row for row in rows if f"{case.of(model)}, {row.name}" not in done]
        if missing:
            _measure(model, case, missing, given, 60 * given.minutes / len(asked), store)
    known = store.read()
    for model, case in asked:
        if not given.prepare:
            print(table(model, case, known).text())
            print(*ratios(model, case, known), sep="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("--peers", default=os.environ.get("PEERS") or ",".join(ROWS))
    parser.add_argument("--models", default=",".join(models.MODELS))
    parser.add_argument("--minutes", type=float, default=40.0, help="without conversions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="measure what is known again")
    parser.add_argument("--prepare", action="store_true", help="install and convert only")
    given = parser.parse_args()
    given.peers = given.peers.replace(",", " ").split()
    given.models = [name.strip() for name in given.models.split(",")]
    for what, found, known in (
        ("engine", given.peers, ROWS),
        ("model", given.models, models.MODELS),
    ):
        if unknown := set(found) - set(known):
            names = ", ".join(sorted(unknown))
            parser.error(f"no {what} {names}; there are {', '.join(known)}")
    return given


def _cases(model: str) -> tuple[Case, ...]:
    return (FIRST,) if models.MODELS[model].eight_bits else (FIRST, *FURTHER)


def _names(model: str, case: Case, engines: list[str], known: Known) -> Iterator[tuple[str, str]]:
    """Engines and variants: all of them at first, further qpass and the best of the others."""
    best = best_others(model, known, BEST)
    for engine in engines:
        for variant in ROWS[engine]:
            if models.MODELS[model].eight_bits and variant not in EIGHT_BITS:
                continue
            if case == FIRST or engine == "qpass" or (engine, variant) in best:
                yield engine, variant


def _measure(
    model: str,
    case: Case,
    rows: list[Row],
    given: argparse.Namespace,
    budget: float,
    store: Results,
) -> None:
    """All of `rows` on one model, in turn; what fails says why and is left out."""
    checkpoint = models.checkpoint(model)
    forms: dict[str, Path] = {}
    for row in rows:
        try:
            forms[row.name] = _form(row.engine, row.variant, model, checkpoint)
        except Failed as why:
            print(f"{row.name}, {model}: left out: {why}", flush=True)
    if given.prepare:
        return
    text = models.text(model, case.prompt + FOLLOWED)
    setting = Setting(given.threads, len(text) + 1, case.batch, case.prompt)
    # rows answer alike however they are asked
    asks = case == FIRST and models.MODELS[model].real
    want = _float_says(checkpoint, text, setting) if asks else None
    pending = [row for row in rows if row.name in forms]
    while pending:
        try:
            running, pending = _started(pending, forms, checkpoint, setting, text, want)
            # to start takes as long as the rounds
            share = budget / 2 * len(running) / len(forms)
            _rounds(running, case, text, given.rounds, time.monotonic() + share)
            for row in running:
                if row.prefill:
                    store.add(f"{case.of(model)}, {row.name}", row.result(case))
        finally:
            for row in rows:
                if row.process is not None:
                    row.process.end()


@functools.cache
def _form(engine: str, variant: str, model: str, checkpoint: Path) -> Path:
    """Where a model lies in an engine's form, which several cases share."""
    return converted(engine, variant, model, checkpoint)


def _started(
    pending: list[Row],
    forms: dict[str, Path],
    checkpoint: Path,
    setting: Setting,
    text: list[int],
    want: Says | None,
) -> tuple[list[Row], list[Row]]:
    """As many rows as memory has room for, at least one, and those that wait for another turn."""
    running: list[Row] = []
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    for at, row in enumerate(pending):
        if running and _available() < ROOM * size:
            return running, pending[at:]
        try:
            _start(row, forms[row.name], setting, text, want)
            running.append(row)
        except Failed as why:
            print(f"{row.name}: left out: {why}", flush=True)
            if row.process is not None:
                row.process.end()
    return running, []


def _rounds(running: list[Row], case: Case, text: list[int], rounds: int, end: float) -> None:
    for turn in range(rounds):
        if turn and time.monotonic() > end:
            print(f"{turn} of {rounds} rounds fit in the time", flush=True)
            return
        # nobody always runs after the same neighbour
        first = turn % len(running) if running else 0
        for row in [*running[first:], *running[:first]]:
            try:
                _round(row, case, text)
            except Failed as why:
                print(f"{row.name}: left out: {why}", flush=True)
                running.remove(row)


def _start(row: Row, form: Path, setting: Setting, text: list[int], want: Says | None) -> None:
    """Load the model, see whether it says what it should, and warm it up by that."""
    row.process = Process(row.engine, row.variant, form, setting)
    if want is None:
        # pays for compiling, as the questions do
        prompts = [text[: setting.prompt]] * setting.batch
        row.process.ask({"prompts": prompts, "tokens": 4})
        return
    row.lost = Says.of(row.process, text, setting.prompt, PROMPTS).lost(want)
    if row.lost.at_once < LEAST_AGREED:
        raise Failed(f"it says what the float model says after {row.lost.at_once:.0%} of prompts")
    if row.lost.agreed < LEAST_AGREED:
        row.writes = False
        print(
            f"{row.name}: only prompts are timed: token by token it says what the float model says "
            f"for {row.lost.agreed:.0%} of them",
            flush=True,
        )


def _available() -> float:
    """Bytes of memory that a process could still take."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else float("inf")


def _round(row: Row, case: Case, text: list[int]) -> None:
    assert row.process is not None
    read = row.process.ask({"prompts": [text[: case.prompt]] * case.batch, "tokens": 0})
    row.prefill.append(read["first"])
    row.megabytes = read["megabytes"]
    if row.writes:
        prompts = [text[: case.context]] * case.batch
        wrote = row.process.ask({"prompts": prompts, "tokens": WRITTEN})
        row.decode.append(statistics.median(wrote["each"]))
        row.megabytes = wrote["megabytes"]


def _float_says(checkpoint: Path, text: list[int], setting: Setting) -> Says:
    process = Process(*FLOAT, checkpoint, setting)
    try:
        return Says.of(process, text, setting.prompt, PROMPTS)
    finally:
        process.end()


if __name__ == "__main__":
    main()
