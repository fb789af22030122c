"""`make bench-peers`: how fast qpass and other engines read prompts and write tokens, in turn.

Each engine lives in an environment of its own under `.data/peers`; models in its form and what was
measured are kept there too. One process for each row stands still while another runs.
"""

# ruff: noqa: T201 - a command's output

from __future__ import annotations

import argparse
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qpass.report.table import Table
from tests.bench.engines import models
from tests.bench.engines.process import Failed, Process, converted
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "bench-peers.jsonl"
# tokens before those that are written, and of the prompt whose reading is timed
CONTEXT, PROMPT = 128, 512
# tokens that are written in a round
WRITTEN = 24
# so many tokens follow in a text, at each of which an engine says what would come next
FOLLOWED = 64
# so many prompts of that text are read at once for the same question
PROMPTS = 8
# a row that says other tokens than the float model more often than this computes something else
# (4-bit weights change up to a third of what a small model says)
LEAST_AGREED = 0.5
# another model is started while there is memory for so many of its checkpoints
ROOM = 2.0
# what the best engine's tokens a second are to be multiplied by, on a machine with AMX
TARGETS = {"SmolLM2-135M": (1.4, 2.2), "1.1B": (1.35, 2.5)}
FLOAT = ("torch", "float32")
# engine -> variants, best known first; qpass's rows run in the environment of this checkout
ROWS = {
    "qpass": ("qpass w4a8", "qpass w8a8"),
    "torch": ("bfloat16",),
    "onnxruntime": ("int4 level 4", "int8 dynamic"),
    "openvino": ("int4", "int8"),
    "llamacpp": ("Q4_0", "Q8_0"),
    "torchao": ("int8 dynamic",),
}


@dataclass(frozen=True)
class Says:
    """What a model says comes next: after several prompts, and after each token of one text."""

    prompts: Sequence[int]
    following: Sequence[int]

    @classmethod
    def of(cls, process: Process, text: list[int]) -> Says:
        starts = range(0, len(text) - PROMPT, FOLLOWED // PROMPTS)
        prompts = (text[start : start + PROMPT] for start in starts)
        read = [process.ask({"prompt": prompt, "tokens": 0})["next"] for prompt in prompts]
        found = process.ask({"prompt": text[:PROMPT], "follow": text[PROMPT:]})["says"]
        return cls(read, found)


@dataclass
class Row:
    """One engine with one kind of weights, and what came of it."""

    engine: str
    variant: str
    process: Process | None = None
    decode: list[float] = field(default_factory=list)  # seconds for a token
    prefill: list[float] = field(default_factory=list)  # seconds for the prompt
    agreed: float | None = None
    writes: bool = True  # what it says token by token can be trusted
    megabytes: int = 0

    @property
    def name(self) -> str:
        return self.variant if self.engine == "qpass" else f"{self.engine} {self.variant}"

    def result(self) -> dict[str, object]:
        return {
            "decode": [1 / s for s in self.decode],
            "prefill": [PROMPT / s for s in self.prefill],
            "agreed": self.agreed,
            "megabytes": self.megabytes,
            "load": self.process.load if self.process else None,
        }


def main() -> None:
    """Measure the rows that are not known yet, side by side, then print all of them."""
    parser = argparse.ArgumentParser(prog="make bench-peers", description=__doc__)
    parser.add_argument("--peers", default=os.environ.get("PEERS") or ",".join(ROWS))
    parser.add_argument("--models", default=",".join(models.MODELS))
    parser.add_argument("--minutes", type=float, default=40.0, help="without conversions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="measure what is known again")
    parser.add_argument("--prepare", action="store_true", help="install and convert only")
    given = parser.parse_args()
    # what stands still would stay for ever: leave by the way that ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    engines = [name for name in given.peers.replace(",", " ").split() if name]
    if unknown := set(engines) - set(ROWS):
        parser.error(f"no engine {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    sources = (*Path(__file__).parent.glob("*.py"), *(ROOT / "kernels" / "cpu").glob("*.[ch]pp"))
    store = Results(STORE, *sorted(sources))
    asked = given.models.split(",")
    for name in asked:
        rows = [Row(e, variant) for e in engines for variant in ROWS[e]]
        known = {} if given.fresh else store.read()
        missing = [row for row in rows if f"{name}, {row.name}" not in known]
        if missing:
            budget = 60 * given.minutes / len(asked)
            _measure(name, missing, given, budget, store)
    known = store.read()
    for name in asked:
        print(table(name, known).text())
        print(*ratios(name, known), sep="\n")


def _measure(
    name: str, rows: list[Row], given: argparse.Namespace, budget: float, store: Results
) -> None:
    """All of `rows` on one model, in turn; what fails says why and is left out."""
    checkpoint = models.checkpoint(name)
    forms: dict[str, Path] = {}
    for row in rows:
        try:
            forms[row.name] = converted(row.engine, row.variant, name, checkpoint)
        except Failed as why:
            print(f"{row.name}, {name}: left out: {why}", flush=True)
    if given.prepare:
        return
    text = models.text(name, PROMPT + FOLLOWED)
    want = _float_says(checkpoint, text, given.threads) if models.MODELS[name].real else None
    end = time.monotonic() + budget
    pending = [row for row in rows if row.name in forms]
    while pending:
        try:
            running, pending = _started(pending, forms, checkpoint, given.threads, text, want)
            _rounds(running, text[:PROMPT], given.rounds, end)
            for row in running:
                if row.prefill:
                    store.add(f"{name}, {row.name}", row.result())
        finally:
            for row in rows:
                if row.process is not None:
                    row.process.end()


def _started(
    pending: list[Row],
    forms: dict[str, Path],
    checkpoint: Path,
    threads: int,
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
            _start(row, forms[row.name], threads, text, want)
            running.append(row)
        except Failed as why:
            print(f"{row.name}: left out: {why}", flush=True)
            if row.process is not None:
                row.process.end()
    return running, []


def _rounds(running: list[Row], prompt: list[int], rounds: int, end: float) -> None:
    for turn in range(rounds):
        if turn and time.monotonic() > end:
            print(f"{turn} of {rounds} rounds fit in the time", flush=True)
            return
        # nobody always runs after the same neighbour
        first = turn % len(running) if running else 0
        for row in [*running[first:], *running[:first]]:
            try:
                _round(row, prompt)
            except Failed as why:
                print(f"{row.name}: left out: {why}", flush=True)
                running.remove(row)


def _start(row: Row, form: Path, threads: int, text: list[int], want: Says | None) -> None:
    """Load the model, see whether it says what it should, and warm it up by that."""
    row.process = Process(row.engine, row.variant, form, threads, len(text) + 1)
    if want is None:
        # pays for compiling, as the questions do
        row.process.ask({"prompt": text[:PROMPT], "follow": text[PROMPT : PROMPT + 4]})
        return
    says = Says.of(row.process, text)
    row.agreed = _agreement(says.following, want.following)
    at_once = _agreement(says.prompts, want.prompts)
    if at_once < LEAST_AGREED:
        raise Failed(f"it says what the float model says after {at_once:.0%} of the prompts")
    if row.agreed < LEAST_AGREED:
        row.writes = False
        print(
            f"{row.name}: only prompts are timed: token by token it says what the float model says "
            f"for {row.agreed:.0%} of them",
            flush=True,
        )


def _agreement(says: Sequence[int], want: Sequence[int]) -> float:
    return statistics.fmean(a == b for a, b in zip(says, want, strict=True))


def _available() -> float:
    """Bytes of memory that a process could still take."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else float("inf")


def _round(row: Row, prompt: list[int]) -> None:
    assert row.process is not None
    read = row.process.ask({"prompt": prompt, "tokens": 0})
    row.prefill.append(read["first"])
    row.megabytes = read["megabytes"]
    if row.writes:
        wrote = row.process.ask({"prompt": prompt[:CONTEXT], "tokens": WRITTEN})
        row.decode.append(statistics.median(wrote["each"]))


def _float_says(checkpoint: Path, text: list[int], threads: int) -> Says:
    process = Process(*FLOAT, checkpoint, threads, len(text) + 1)
    try:
        return Says.of(process, text)
    finally:
        process.end()


def table(name: str, known: dict[str, dict[str, object]]) -> Table:
    """What is known of one model, a line for each row."""
    lines = [
        (
            row.removeprefix(f"{name}, "),
            *_spread(found["decode"]),
            *_spread(found["prefill"]),
            1e3 * PROMPT / statistics.median(found["prefill"]),
            found["megabytes"],
            found["load"],
            found["agreed"],
        )
        for row, found in _rows(name, known).items()
    ]
    columns = (
        "engine", "decode tokens/s", "spread", "prefill tokens/s", "spread", "first ms", "MB",
        "load s", "agrees",
    )  # fmt: skip
    title = (
        f"{name}: one by one after {CONTEXT} tokens, a prompt of {PROMPT} until its first token; "
        "spread is (most - least) / median of the rounds; MB at most, beside what imports took"
    )
    return Table(title, columns, tuple(lines))


def _rows(name: str, known: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    names = [
        f"{name}, {Row(e, variant).name}" for e, several in ROWS.items() for variant in several
    ]
    return {row: known[row] for row in names if row in known}


def _spread(rates: Sequence[float]) -> tuple[float | None, float | None]:
    if not rates:
        return None, None
    middle = statistics.median(rates)
    return middle, (max(rates) - min(rates)) / middle


def ratios(name: str, known: dict[str, dict[str, object]]) -> list[str]:
    """The best row of qpass over the best of the others, and what it is to be."""
    said: list[str] = []
    found = _rows(name, known)
    own = [f"{name}, {variant}" for variant in ROWS["qpass"]]
    for what, target in zip(("decode", "prefill"), TARGETS[name], strict=True):
        rates = {row: statistics.median(r[what]) for row, r in found.items() if r[what]}
        ours = {row: rate for row, rate in rates.items() if row in own}
        theirs = {row: rate for row, rate in rates.items() if row not in own}
        if not ours or not theirs:
            continue
        us, they = max(ours, key=ours.__getitem__), max(theirs, key=theirs.__getitem__)
        short, other = (row.removeprefix(f"{name}, ") for row in (us, they))
        said.append(
            f"{what}: {short} is {ours[us] / theirs[they]:.2f} times as fast as {other}; "
            f"the target on a machine with AMX is {target}"
        )
    return said


if __name__ == "__main__":
    main()
