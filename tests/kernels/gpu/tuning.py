"""Times every configuration of kernels on a GPU, and writes tables of the fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qpass.runtime.gpu import KERNELS, Call
from qpass.runtime.target import Target, target_of
from qpass.runtime.tuned import Table, tune
from tests.kernels.gpu.report import Row, guarded, say
from tests.kernels.gpu.timed import seconds, sets, timed


def write_table(rows: list[Row], path: Path) -> None:
    """The fastest configurations of all operators, with those the table has of others."""
    whole = Table.load(path) if path.exists() else None
    for row in rows:
        if "table" in row:
            found = Table(**row["table"])
            whole = found if whole is None else whole.joined(found)
    if whole is not None:
        whole.save(path)
        say(f"wrote {path}; QPASS_GPU_TABLE={path} puts it to use")


def warm(which: str, shares: int) -> Iterator[Row]:
    """Compile a share of the configurations, so that they are known when they are timed."""
    operator, _, share = which.partition(":")
    number = 0
    for kernel, call, case in tunable(operator):
        for candidate in kernel.tuning.candidates(call):
            number += 1
            if number % shares == int(share):
                row = guarded(
                    f"{case.name} {candidate}",
                    lambda k=kernel, c=call, v=candidate: {"why": str(k.tuning.run(c, v))[:0]},
                )
                if not row.get("ok", True):
                    yield row


def tunable(operator: str) -> Iterator[tuple[Any, Any, Any]]:
    """Kernels, calls they serve in several ways, and the cases these come from."""
    on = target_of(0)
    assert isinstance(on, Target)
    for case in timed():
        if case.operator != operator:
            continue
        call = Call.of(case.operator, case.make(), on)
        for kernel in KERNELS:
            if kernel.operator == operator and kernel.tuning and kernel.accepts(call) is None:
                yield kernel, call, case


def timings(operator: str) -> Iterator[Row]:
    """Time every configuration of every kernel: a table, and the best four of a shape to read."""
    found = list(tunable(operator))
    cases = {id(call): case for _, call, case in found}
    best: dict[str, list[tuple[float, str]]] = {}
    operands: dict[int, list[Any]] = {}

    def clock(kernel: Any, call: Any, candidate: Any) -> float | None:
        case = cases[id(call)]
        if id(call) not in operands:
            operands.clear()
            cost = kernel.cost(call)
            floor = call.target.seconds(cost.nbytes, cost.operations, cost.kind)
            more = range(sets(cost.nbytes, floor) - 1)
            made = [Call.of(case.operator, case.make(), call.target) for _ in more]
            operands[id(call)] = [call, *made]

        def timed_once() -> Row:
            calls = operands[id(call)]
            return {"us": seconds([lambda c=c: kernel.tuning.run(c, candidate) for c in calls])}

        took = guarded(case.name, timed_once).get("us")
        if took is not None:
            best.setdefault(case.name, []).append((took * 1e6, f"{kernel.name} {candidate}"))
        return took

    table = tune(torch.cuda.get_device_name(0), [(k, c) for k, c, _ in found], clock)
    yield {"table": dataclasses.asdict(table)}
    for name, times in best.items():
        yield {"name": name, "best": [f"{us:.1f} {label}" for us, label in sorted(times)[:4]]}
