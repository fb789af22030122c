"""Whether a plan that was made elsewhere is one for this program."""

from __future__ import annotations

from qpass.analyze import by_name, find_matmuls, find_tables, rotatable_regions
from qpass.errors import BadInput
from qpass.ir import Program
from qpass.plan.plan import Plan
from qpass.plan.recipe import Role

_SHOWN = 3


def expect_fits(plan: Plan, program: Program) -> None:
    """Raise `BadInput` where a plan names what `program`, its norms folded, does not have."""
    turning = [choice.region for choice in (*plan.rotated, *plan.paired)]
    regions = by_name(rotatable_regions(program)) if turning else {}
    products = {program.site(matmul.use) for matmul in find_matmuls(program)}
    tables = {program.site(use) for use in find_tables(program)}
    missing = [f"region {name}" for name in turning if name not in regions]
    missing += [f"product {o.site}" for o in plan.online if o.site not in products]
    for choice in plan.quantized:
        table = choice.role is Role.EMBEDDING
        if choice.site not in (tables if table else products):
            missing.append(f"{'table' if table else 'product'} {choice.site}")
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise BadInput(
            f"plan: the model has no {', no '.join(missing[:_SHOWN])}{more}\n"
            "  a plan fits the model it was made for; give a recipe instead"
        )
    for choice in plan.rotated:
        if pins := regions[choice.region].pins:
            raise BadInput(
                f"plan: region {choice.region} cannot turn: {pins[0].why} ({pins[0].where})\n"
                "  a plan fits the model it was made for; give a recipe instead"
            )
