"""Whether a plan that was made elsewhere is one for this program."""

from __future__ import annotations

from collections.abc import Collection

from qpass.analyze import (
    Region,
    by_name,
    find_convolutions,
    find_inputs,
    find_matmuls,
    find_regions,
    find_tables,
    rotatable_regions,
)
from qpass.errors import BadInput
from qpass.ir import Program
from qpass.plan.plan import Changed, Plan
from qpass.plan.recipe import Role
from qpass.rotations import Element, Group

_SHOWN = 3


def expect_fits(plan: Plan, program: Program) -> None:
    """Raise `BadInput` where a plan names what `program`, its norms folded, does not have."""
    turning = [choice.region for choice in (*plan.rotated, *plan.paired)]
    regions = by_name(rotatable_regions(program)) if turning else {}
    products = {program.site(matmul.use) for matmul in find_matmuls(program)}
    tables = {program.site(use) for use in find_tables(program)}
    groups = {choice.group for choice in plan.changed}
    solved = {group: by_name(find_regions(program, group)) for group in groups}
    missing = [f"region {name}" for name in turning if name not in regions]
    missing += [f"region {c.region}" for c in plan.changed if c.region not in solved[c.group]]
    reading = [*find_inputs(program), *(c.use for c in find_convolutions(program))]
    inputs = {program.site(use) for use in reading} if plan.online else set[str]()
    missing += [f"product {o.site}" for o in plan.online if o.site not in inputs]
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
        if isinstance(choice.transform, Element):
            _expect_turns(choice.region, regions[choice.region], choice.transform)
    for choice in plan.changed:
        region = solved[choice.group][choice.region]
        if (why := refusal(region, choice)) is not None:
            raise BadInput(
                f"plan: region {choice.region} cannot change by {choice.element.rotation}: {why}\n"
                f"  give an element of its group, {region.group.value}, or leave it out"
            )


def refusal(region: Region, choice: Changed) -> str | None:
    """Why a region cannot change by an element, or None."""
    element = choice.element
    if region.pins:
        return f"{region.pins[0].why} ({region.pins[0].where})"
    if (why := _misfit(region, element)) is not None:
        return why
    if not element.group <= region.group:
        return f"it is one of the {element.group.value}, not of the {region.group.value}"
    whole = all(site.power in (1, -1) for site in region.sites)
    if not whole and element.group is not Group.POSITIVE_DIAGONAL:
        return "a power of it is taken, which positive scales have"
    return None


def admitted(program: Program, plan: Plan, held: Collection[str]) -> tuple[Changed, ...]:
    """The changes whose regions are free in a program that may know only part of the model."""
    groups = {choice.group for choice in plan.changed}
    solved = {g: by_name(find_regions(program, g, held=held)) for g in groups}
    return tuple(
        choice
        for choice in plan.changed
        if (region := solved[choice.group].get(choice.region)) is not None
        and refusal(region, choice) is None
    )


def _expect_turns(name: str, region: Region, element: Element) -> None:
    why = _misfit(region, element)
    if region.group is Group.ORTHOGONAL_ONES and not element.lifted:
        why = "a norm there subtracts a mean, so the all-ones vector must stay; lift the matrix"
    if why is not None:
        raise BadInput(
            f"plan: region {name} cannot turn by {element.rotation}: {why}\n"
            f"  give an element of its group, {region.group.value}"
        )


def _misfit(region: Region, element: Element) -> str | None:
    element.given()
    if element.width != region.width or element.heads not in (1, region.heads):
        return (
            f"the region is {region.heads} x {region.width}, "
            f"the element {element.heads} x {element.width}"
        )
    return None
