"""`make accuracy`: what quantizing costs real models, by format and by method, kept as it goes."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

from qpass.report.table import Table
from tests.accuracy.grid import METHODS, SETTINGS
from tests.accuracy.rows import TASKS, Row, measure
from tests.accuracy.task import JUDGED, Measured, Task
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "accuracy.jsonl"


def main() -> None:
    """Measure what this code has not measured yet, then print all of it."""
    parser = argparse.ArgumentParser(prog="make accuracy", description=__doc__)
    parser.add_argument("--model", action="append", choices=TASKS, help="only these")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only these")
    parser.add_argument("--method", action="append", choices=METHODS, help="only these")
    parser.add_argument("--seeds", type=int, help="of methods that draw something")
    parser.add_argument("--samples", type=int, help="of calibration")
    parser.add_argument("--every", type=int, help="which samples are evaluated")
    parser.add_argument("--minutes", type=float, default=120.0, help="then no other row is begun")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time")
    parser.add_argument("--full", action="store_true", help="methods that take long everywhere")
    parser.add_argument("--stale", action="store_true", help="results of other code count too")
    given = parser.parse_args()
    here = Path(__file__)
    store = Results(STORE, *(f for f in sorted(here.parent.glob("*.py")) if f != here))
    kept = store.read(stale=given.stale)
    rows = sorted(_rows(given), key=lambda row: row.seed)
    read = {row.name: Measured(**kept[row.name]) for row in rows if row.name in kept}  # type: ignore
    # older code chose between methods in other ways
    known = {name: found for name, found in read.items() if JUDGED in found.values}
    missing = [row for row in rows if row.name not in known]
    for row, found in measure(missing, given.jobs, time.time() + 60 * given.minutes):
        known[row.name] = found
        store.add(row.name, asdict(found))
        values = ", ".join(f"{n} {v:.4g}" for n, v in found.values.items())
        print(f"{row.name}: {values}; {found.seconds:.0f} s", flush=True)  # noqa: T201
    left = sum(row.name not in known for row in rows)
    for model in given.model or TASKS:
        of = [row for row in rows if row.model == model]
        print(_table(model, of, known).text())  # noqa: T201
    if left:
        print(f"{left} of {len(rows)} rows are not measured yet: run it again")  # noqa: T201


def _rows(given: argparse.Namespace) -> Iterator[Row]:
    for model in given.model or TASKS:
        task: Task = TASKS[model]
        amount, every = given.samples or task.amount, given.every or task.every
        for setting in given.setting or task.settings:
            for method in given.method or task.methods:
                if not (given.method or given.full or setting in METHODS[method].settings):
                    continue
                seeds = (given.seeds or task.seeds) if METHODS[method].seeded else 1
                for seed in range(seeds):
                    yield Row(model, setting, method, seed, amount, every)


def _table(model: str, rows: list[Row], known: dict[str, Measured]) -> Table:
    """Medians over the seeds, and the spread of the first number between them.

    The last line of a setting is the method that other samples of the calibration data preferred.
    """
    found: dict[tuple[str, str], list[Measured]] = {}
    for row in rows:
        if row.name in known:
            found.setdefault((row.setting, row.method), []).append(known[row.name])
    names = list(next(iter(found.values()))[0].values) if found else []
    lines: list[tuple[object, ...]] = []
    for setting in dict.fromkeys(setting for setting, _ in found):
        methods = [method for of, method in found if of == setting]
        best = min(methods, key=lambda m: median(x.values[JUDGED] for x in found[setting, m]))
        found[setting, f"best: {best}"] = found[setting, best]
    order = list(dict.fromkeys(setting for setting, _ in found))
    for (setting, method), of in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        first = sorted(m.values[names[0]] for m in of)
        medians = (median(m.values[name] for m in of) for name in names)
        lines.append(
            (setting, method, *medians, f"{first[0]:.4g} to {first[-1]:.4g}", len(of),
             of[0].samples, median(m.seconds for m in of))
        )  # fmt: skip
    spread = f"{names[0]} by seed" if names else "by seed"
    columns = ("setting", "method", *names, spread, "seeds", "on", "seconds")
    return Table(f"accuracy of {model}", columns, tuple(lines))


if __name__ == "__main__":
    main()
