"""What was done to a model, and what was declined and why?"""

from __future__ import annotations

from collections.abc import Iterable

from qpass.ir import Note
from qpass.plan import Plan
from qpass.quantize.containers import REFERENCE, by_reference
from qpass.report.table import Cell, Table
from qpass.rotations import Element, Kronecker, Transform


def notes_table(title: str, notes: Iterable[Note]) -> Table:
    """One row for each note, the refusals first: they are what a reader looks for."""
    ordered = sorted(notes, key=lambda note: note.done)
    rows = tuple(("done" if n.done else "declined", n.where, n.why) for n in ordered)
    return Table(title, ("what", "where", "why"), rows)


def plan_table(plan: Plan) -> Table:
    """One row for each choice of a plan, in the order the plan holds them."""
    rows: list[tuple[Cell, ...]] = [
        ("rotated", entry.region, _transform(entry.transform)) for entry in plan.rotated
    ]
    rows += [("online", entry.site, _transform(entry.transform)) for entry in plan.online]
    rows += [
        ("paired", entry.region, f"{_transform(entry.transform)}: {entry.why}")
        for entry in plan.paired
    ]
    rows += [("changed", entry.region, _transform(entry.element)) for entry in plan.changed]
    for entry in plan.quantized:
        stored = entry.weight.format
        read = "float" if (spec := entry.activation) is None else spec.format
        if spec is not None and (spec.static or spec.clip != 1):
            read = f"static {read}" if spec.static else f"{read} clipped at {spec.clip:.2f}"
        slow = f", {REFERENCE}" if by_reference(entry.weight, entry.activation) else ""
        how = f"{stored} weight, {read} input, {entry.rounding}{slow}"
        rows.append(("quantized", entry.site, how))
    rows += [("declined", entry.where, entry.why) for entry in plan.declined]
    return Table("plan", ("what", "where", "how"), tuple(rows))


def _transform(transform: Transform | Element | Kronecker) -> str:
    heads = "" if transform.heads == 1 else f"{transform.heads} heads of "
    return f"{transform.rotation}, {heads}width {transform.width}"
