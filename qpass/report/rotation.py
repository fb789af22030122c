"""What a rotation did, as text: how exact it is, how far it reaches, and what was declined."""

from __future__ import annotations

from qpass.plan import Plan
from qpass.report.coverage import Coverage, coverage_table
from qpass.report.table import Table, collapsed


def rotation_text(
    plan: Plan, coverage: Coverage, online: tuple[int, ...], errors: tuple[float, float]
) -> str:
    """Errors (in float64, and of the module itself), coverage, and a reason per refusal."""
    declined = Table("declined", ("where", "why"), tuple((d.where, d.why) for d in plan.declined))
    columns = ("regions", "in part", "online", "error in float64", "error of the module")
    row = (len(plan.rotated), len(plan.paired), len(plan.online), *errors)
    tables = [Table("rotated", columns, (row,)), coverage_table(coverage, online)]
    tables += [collapsed(declined, ("where", "why"))] if plan.declined else []
    return "\n".join(table.text() for table in tables)
