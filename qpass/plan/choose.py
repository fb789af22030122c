"""What to do to a program: from a recipe and the regions of the graph to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch

from qpass.analyze import (
    Matmul,
    Region,
    Role,
    find_heads,
    find_matmuls,
    find_tables,
    rotatable_regions,
)
from qpass.ir import Program, read
from qpass.plan.plan import Declined, Online, Plan, Quantized, Rotated
from qpass.plan.recipe import Recipe
from qpass.plan.recipe import Role as Storage
from qpass.rotations import ROTATIONS, Group, Transform

# the relative output error of each site under a plan, measured or predicted
Errors = Callable[[Plan], Mapping[str, float]]


def choose(
    program: Program,
    recipe: Recipe,
    *,
    held: Collection[str] = (),
    refusals: Mapping[str, str] | None = None,
    stored: bool = False,
    errors: Errors | None = None,
) -> Plan:
    """Plan `recipe` for a program whose norms are folded.

    Values named in `held` keep their basis; `refusals` says, by use, why a target can neither
    quantize a weight nor transform the input of its product. With `stored`, a tensor of a module
    has one value for all its uses, so a layer that is called twice changes alike in both calls or
    not at all. With `rotation = "auto"`, `errors` decides, region by region and site by site; a
    plan without rotations is always a candidate.
    """
    sites = _Sites.of(program, held, refusals or {})
    quantized, declined = _quantize(sites, recipe)
    plan = Plan(recipe, quantized=quantized, declined=declined)
    if recipe.rotation == "off":
        return plan
    rotated, declined = _rotate(sites, recipe, stored=stored)
    online, more = _online(sites, recipe, rotated)
    full = replace(
        plan, rotated=rotated, online=online, declined=(*plan.declined, *declined, *more)
    )
    if recipe.rotation == "on" or errors is None:
        return full
    return _weigh(sites, plan, full, errors)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Sites:
    """The facts that choices are made from."""

    program: Program
    matmuls: tuple[Matmul, ...]
    heads: frozenset[str]
    regions: tuple[Region, ...]
    refusals: Mapping[str, str]

    @staticmethod
    def of(program: Program, held: Collection[str], refusals: Mapping[str, str]) -> _Sites:
        regions = rotatable_regions(program, held=held)
        matmuls = find_matmuls(program)
        return _Sites(program, matmuls, find_heads(program, matmuls), regions, refusals)

    def name(self, matmul: Matmul) -> str:
        return self.program.site(matmul.use)

    def readers(self, region: Region) -> list[Matmul]:
        """The products whose input changes with a region."""
        reading = {(s.use, s.axis) for s in region.sites if s.role is Role.READS}
        return [m for m in self.matmuls if (m.use, m.reads) in reading]

    def shape(self, matmul: Matmul) -> tuple[int, int]:
        """Rows and columns of a product's weight."""
        shape = read.shape(self.program.node(matmul.use))
        return int(shape[matmul.writes]), int(shape[matmul.reads])


def _quantize(sites: _Sites, recipe: Recipe) -> tuple[tuple[Quantized, ...], tuple[Declined, ...]]:
    quantized: list[Quantized] = []
    declined: list[Declined] = []
    for matmul in sites.matmuls:
        storage = Storage.HEAD if matmul.node in sites.heads else Storage.LINEAR
        spec = recipe.spec(storage)
        if spec is None:
            continue
        name = sites.name(matmul)
        if (why := sites.refusals.get(matmul.use)) is not None:
            declined.append(Declined(name, f"not quantized: {why}"))
            continue
        if (why := spec.supports(sites.shape(matmul))) is not None:
            declined.append(Declined(name, f"quantized per channel: {why}"))
            spec = spec.per_channel()
        quantized.append(Quantized(name, storage, spec, recipe.activation, recipe.rounding))
    if (spec := recipe.spec(Storage.EMBEDDING)) is not None:
        for use in find_tables(sites.program):
            name = sites.program.site(use)
            if (why := sites.refusals.get(use)) is not None:
                declined.append(Declined(name, f"not quantized: {why}"))
                continue
            quantized.append(Quantized(name, Storage.EMBEDDING, spec, None, recipe.rounding))
    return _once(quantized), tuple(declined)


def _once(quantized: Iterable[Quantized]) -> tuple[Quantized, ...]:
    """One entry per site: a module called twice is one site with two uses."""
    return tuple({q.site: q for q in quantized}.values())


def _rotate(
    sites: _Sites, recipe: Recipe, *, stored: bool
) -> tuple[tuple[Rotated, ...], tuple[Declined, ...]]:
    rotated: list[Rotated] = []
    declined: list[Declined] = []
    free = {m.use for region in sites.regions if region.free for m in sites.readers(region)}
    for region in sites.regions:
        readers = sites.readers(region)
        if region.width < 2 or not readers:
            continue
        if region.pins and all(m.use in free for m in readers):
            # another factor of the same axis turns, which is all the readers need
            continue
        if region.pins:
            why = f"{region.pins[0].why} ({region.pins[0].where})"
            declined.append(Declined(region.name, f"not rotated: {why}"))
            continue
        if stored and (split := _split(sites.program, region)) is not None:
            why = f"not rotated: {split} is used twice and would change in one place only"
            declined.append(Declined(region.name, why))
            continue
        if recipe.keep_tied and (shared := _tied(sites.program, region)) is not None:
            declined.append(Declined(region.name, f"not rotated: {shared} is tied"))
            continue
        partial = any(sites.shape(m)[1] != region.width for m in readers)
        rotation = recipe.value if partial else recipe.residual
        lifted = region.group is Group.ORTHOGONAL_ONES
        if (why := ROTATIONS[rotation].supports(region.width)) is not None:
            declined.append(Declined(region.name, f"not rotated: {why}"))
            continue
        transform = Transform(rotation, region.width, recipe.seed, region.heads, lifted)
        rotated.append(Rotated(region.name, transform))
    return tuple(rotated), tuple(declined)


def _split(program: Program, region: Region) -> str | None:
    """A stored tensor that the region changes in some of its uses and not in others."""
    changed = {(site.use, site.axis, site.block) for site in region.sites}
    uses: dict[str, list[str]] = {}
    for use, owner in program.owners.items():
        uses.setdefault(owner.path, []).append(use)
    for use, axis, block in changed:
        owner = program.owners.get(use)
        if owner is not None and any((u, axis, block) not in changed for u in uses[owner.path]):
            return owner.path
    return None


def _tied(program: Program, region: Region) -> str | None:
    uses: dict[str | None, int] = {}
    for weight in program.weights.values():
        uses[weight.source] = uses.get(weight.source, 0) + 1
    for site in region.sites:
        source = program.weights[site.use].source
        if source is not None and uses[source] > 1:
            return source
    return None


def _online(
    sites: _Sites, recipe: Recipe, rotated: tuple[Rotated, ...]
) -> tuple[tuple[Online, ...], tuple[Declined, ...]]:
    names = {r.region for r in rotated}
    covered = {m.use for r in sites.regions if r.name in names for m in sites.readers(r)}
    online: list[Online] = []
    declined: list[Declined] = []
    for matmul in sites.matmuls:
        value = sites.program.node(matmul.value)
        # a layer that transforms its input itself needs no second transform
        if matmul.use in covered or read.calls(value, torch.ops.qpass.hadamard.default):
            continue
        name, width = sites.name(matmul), sites.shape(matmul)[1]
        why = sites.refusals.get(matmul.use) or ROTATIONS[recipe.online].supports(width)
        transform = Transform(recipe.online, width, recipe.seed)
        if why is None and transform.fast() is None:
            why = f"{recipe.online} has no fast form"
        if why is not None:
            declined.append(Declined(name, f"its input is not rotated: {why}"))
        elif width > 1:
            online.append(Online(name, transform))
    return tuple({o.site: o for o in online}.values()), tuple(declined)


def _weigh(sites: _Sites, plain: Plan, full: Plan, errors: Errors) -> Plan:
    """Keep each rotation that lowers the summed error of the sites it changes the input of."""
    before, after = errors(plain), errors(full)

    def gains(names: Iterable[str]) -> bool:
        known = [n for n in names if n in before and n in after]
        return sum(after[n] for n in known) < sum(before[n] for n in known)

    readers = {r.name: [sites.name(m) for m in sites.readers(r)] for r in sites.regions}
    rotated = tuple(r for r in full.rotated if gains(readers[r.region]))
    online = tuple(o for o in full.online if gains((o.site,)))
    mixed = replace(full, rotated=rotated, online=online)
    totals = {plan: sum(errors(plan).values()) for plan in (plain, full, mixed)}
    return min((mixed, full, plain), key=lambda plan: totals[plan])


def held_by_cache(program: Program) -> frozenset[str]:
    """The keys and values of every attention: a cache outside the graph may hold them."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    return frozenset(
        read.value(node, name).name
        for node in program.graph.nodes
        if read.calls(node, attention)
        for name in ("key", "value")
    )
