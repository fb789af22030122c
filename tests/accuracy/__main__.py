"""`python -m tests.accuracy`: settings by methods on the language model, resumable."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

from qpass.report.table import Table
from tests.accuracy.grid import METHODS, SETTINGS, recipe
from tests.accuracy.language import EVERY, Quality, evaluation, measured
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "accuracy.jsonl"
SEEDS = 3
WINDOWS = 32  # of calibration


def main() -> None:
    """Measure what this code has not measured yet, then print all of it."""
    parser = argparse.ArgumentParser(prog="make accuracy", description=__doc__)
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only these")
    parser.add_argument("--method", action="append", choices=METHODS, help="only these")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of calibration")
    parser.add_argument("--every", type=int, default=EVERY, help="which windows are evaluated")
    parser.add_argument("--minutes", type=float, default=120.0, help="then no other row is begun")
    parser.add_argument("--stale", action="store_true", help="results of other code count too")
    given = parser.parse_args()
    store = Results(STORE, *sorted(Path(__file__).parent.glob("*.py")))
    known, start = store.read(stale=given.stale), time.monotonic()
    for name, setting, method, seed in _rows(given):
        if name in known or time.monotonic() - start > 60 * given.minutes:
            continue
        found = measured(recipe(setting, method, seed), given.windows, evaluation(given.every))
        known[name] = asdict(found)
        store.add(name, known[name])
        print(  # noqa: T201
            f"{name}: KL {found.kl:.4f}, perplexity {found.perplexity:.2f} of "
            f"{found.reference:.2f}, {found.seconds:.0f} s",
            flush=True,
        )
    print(_table(given, {n: Quality(**r) for n, r in known.items()}).text())  # type: ignore  # noqa: T201


def _rows(given: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Every row, the first seed of all before the second of any."""
    for seed in range(given.seeds):
        for setting in given.setting or SETTINGS:
            for method in given.method or METHODS:
                if seed == 0 or METHODS[method].seeded:
                    yield _name(given, setting, method, seed), setting, method, seed


def _name(given: argparse.Namespace, setting: str, method: str, seed: int) -> str:
    return f"{setting}, {method}, seed {seed}, {given.windows} windows, every {given.every}"


def _table(given: argparse.Namespace, known: dict[str, Quality]) -> Table:
    """Medians over the seeds, and the spread of KL between them."""
    lines: list[tuple[object, ...]] = []
    for setting in given.setting or SETTINGS:
        for method in given.method or METHODS:
            names = [_name(given, setting, method, seed) for seed in range(given.seeds)]
            found = [known[name] for name in names if name in known]
            if found:
                kls = sorted(q.kl for q in found)
                lines.append(
                    (
                        setting,
                        method,
                        median(q.perplexity for q in found),
                        median(kls),
                        f"{kls[0]:.4g} to {kls[-1]:.4g}",
                        median(q.agreement for q in found),
                        found[0].tokens,
                        len(found),
                    )
                )
    columns = ("setting", "method", "perplexity", "KL", "KL by seed", "top-1", "tokens", "seeds")
    return Table("accuracy", columns, tuple(lines))


if __name__ == "__main__":
    main()
