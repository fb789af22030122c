"""What was measured of engines as tables, and who is ahead by how much."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qpass.report.table import Table
from tests.bench.engines.rows import FIRST, ROWS, Case, names

# what the best engine's tokens a second are to be multiplied by, on a machine with AMX
TARGETS = {"SmolLM2-135M": (1.4, 2.2), "1.1B": (1.35, 2.5)}
# of all results, by name
Known = Mapping[str, Mapping[str, Any]]


def table(model: str, case: Case, known: Known) -> Table:
    """What is known of one model, a line for each row."""
    lines: list[tuple[object, ...]] = []
    for name, found in _rows(model, case, known).items():
        lost = found["lost"] or {}
        said = (lost.get("agreed"), lost.get("kl"), lost.get("perplexity"))
        first = 1e3 * statistics.median(found["first"])
        rest = (first, found["megabytes"], found["load"], *said)
        lines.append((name, *_spread(found["decode"]), *_spread(found["prefill"]), *rest))
    columns = (
        "engine", "decode tokens/s", "spread", "prefill tokens/s", "spread", "first ms", "MB",
        "load s", "agrees", "KL", "perplexity x",
    )  # fmt: skip
    many = "" if case.batch == 1 else f" of {case.batch} sequences"
    title = (
        f"{case.of(model)}: one by one after {case.context} tokens{many}, a prompt of "
        f"{case.prompt} until its first token; spread is (most - least) / median of the rounds; "
        "MB at most, beside what imports took; what is lost is against float32, token by token"
    )
    return Table(title, columns, tuple(lines))


def ratios(model: str, case: Case, known: Known) -> list[str]:
    """The best row of qpass over the best of the others, and what it is to be."""
    said: list[str] = []
    for at, what in enumerate(("decode", "prefill")):
        rates = {
            n: statistics.median(r[what]) for n, r in _rows(model, case, known).items() if r[what]
        }
        ours = {name: rate for name, rate in rates.items() if _own(name)}
        theirs = {name: rate for name, rate in rates.items() if not _own(name)}
        if not ours or not theirs:
            continue
        us, they = max(ours, key=ours.__getitem__), max(theirs, key=theirs.__getitem__)
        line = f"{what}: {us} is {ours[us] / theirs[they]:.2f} times as fast as {they}"
        if case == FIRST and model in TARGETS:
            line += f"; the target on a machine with AMX is {TARGETS[model][at]}"
        said.append(line)
    return said


def best_others(model: str, known: Known, count: int) -> list[tuple[str, str]]:
    """The engines, beside qpass, that write fastest, each with its fastest variant."""
    found: dict[str, tuple[float, str]] = {}
    for engine, variants in ROWS.items():
        for variant in variants:
            result = known.get(f"{FIRST.of(model)}, {engine} {variant}")
            if engine != "qpass" and result is not None and result["decode"]:
                rate = statistics.median(result["decode"])
                found[engine] = max(found.get(engine, (0.0, "")), (rate, variant))
    order = sorted(found, key=lambda engine: -found[engine][0])[:count]
    return [(engine, found[engine][1]) for engine in order]


def _rows(model: str, case: Case, known: Known) -> dict[str, Mapping[str, Any]]:
    start = f"{case.of(model)}, "
    return {name.removeprefix(start): known[name] for name in names(model, case) if name in known}


def _own(row: str) -> bool:
    return row.startswith("qpass ")


def _spread(rates: Sequence[float]) -> tuple[float | None, float | None]:
    if not rates:
        return None, None
    middle = statistics.median(rates)
    return middle, (max(rates) - min(rates)) / middle
