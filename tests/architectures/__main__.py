"""`python -m tests.architectures [TYPE ...]`: one line for each architecture, then the targets."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.architectures.catalogue import Architecture, architectures
from tests.architectures.matrix import TYPES, markdown
from tests.architectures.measure import PREFIX, Result
from tests.architectures.surface import ABSENT, SAME
from tests.architectures.verdict import summary, targets
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "zoo.jsonl"
AT_ONCE = 2
SECONDS = 240  # for one model
MINUTES = 58  # after which no other model is begun


def main() -> int:
    """Measure what has not been measured by this code; 1 where a target is missed."""
    parser = argparse.ArgumentParser(prog="make zoo", description=__doc__)
    parser.add_argument("types", nargs="*", help="only these model types, measured again")
    parser.add_argument("--status", help="only those whose last result was this, measured again")
    parser.add_argument("--stale", action="store_true", help="results of other code count too")
    parser.add_argument("--matrix", action="store_true", help="print the table of the README")
    given = parser.parse_args()
    if given.matrix:
        given.types = list(TYPES)
    store = Results(STORE, *sorted(Path(__file__).parent.glob("*.py")))
    known = {} if given.types and not given.matrix else _stored(store, stale=given.stale)
    chosen = [a for a in architectures() if not given.types or a.type in given.types]
    if given.status:
        known = _stored(store, stale=True)
        chosen = [a for a in chosen if a.type in known and known[a.type].status == given.status]
        known = {}
    results: list[Result] = []
    print(_line(None), flush=True)  # noqa: T201
    for result in _all(chosen, known, store):
        results.append(result)
        print(_line(result), flush=True)  # noqa: T201
    if given.matrix:
        print(f"\n{markdown({r.type: r for r in results})}")  # noqa: T201
        return int(any(r.status != "ok" for r in results))
    print(summary(results))  # noqa: T201
    return 0 if all(t.met for t in targets(results)) else 1


def _all(chosen: list[Architecture], known: dict[str, Result], store: Results) -> Iterator[Result]:
    """A result for each, in their order; new ones are stored as soon as they are there."""
    start = time.monotonic()

    def one(of: Architecture) -> Result:
        if of.type in known:
            return known[of.type]
        if time.monotonic() - start > 60 * MINUTES:
            return Result(of.type, of.task, "timeout", f"not begun within {MINUTES} minutes")
        result = _measured(of)
        store.add(result.type, asdict(result))
        return result

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(one, chosen)


def _measured(of: Architecture) -> Result:
    """What a process of its own says."""
    command = [sys.executable, "-m", "tests.architectures.measure", of.type]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    start = time.monotonic()
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT, env=settings
        )
    except subprocess.TimeoutExpired:
        return Result(of.type, of.task, "timeout", f"over {SECONDS} seconds", SECONDS)
    lines = [line for line in ran.stdout.splitlines() if line.startswith(PREFIX)]
    if not lines:
        said = " ".join(ran.stderr.split())[-300:]
        seconds = round(time.monotonic() - start, 1)
        return Result(of.type, of.task, "died", f"exit status {ran.returncode}: {said}", seconds)
    return Result(**json.loads(lines[-1][len(PREFIX) :]))


def _stored(store: Results, *, stale: bool) -> dict[str, Result]:
    return {name: Result(**kept) for name, kept in store.read(stale=stale).items()}


def _line(result: Result | None) -> str:
    if result is None:
        return (
            f"{'type':26}{'task':9}{'error':>9}{'eager':>9}{'other':>9}{'folded':>8}{'online':>8}"
            f"{'left':>7}{'ops':>5}{'shown':>7}{'s':>7}  status"
        )
    errors = "".join(
        f"{'-' if e is None else f'{e:.0e}':>9}" for e in (result.error, result.eager, result.other)
    )
    counted = result.error is not None
    parts = (result.folded, result.online, result.declined)
    shares = "".join(
        f"{f'{p:.2f}' if counted else '-':>{w}}" for p, w in zip(parts, (8, 8, 7), strict=True)
    )
    asked = [said for said in result.shown.values() if said != ABSENT]
    shown = f"{sum(said == SAME for said in asked)}/{len(asked)}" if asked else "-"
    ops = result.transforms if counted else "-"
    why = result.reason or "; ".join(sorted(result.reasons, key=lambda r: -result.reasons[r])[:2])
    text = f"{result.status}{': ' + why if why else ''}"
    numbers = f"{errors}{shares}{ops:>5}{shown:>7}{result.seconds:>7}"
    return f"{result.type[:25]:26}{result.task:9}{numbers}  {text[:200]}"


if __name__ == "__main__":
    sys.exit(main())
