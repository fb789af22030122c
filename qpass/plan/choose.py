"""What to do to a program: from a recipe and the regions of the graph to a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch

from qpass.analyze import (
    Convolution,
    Matmul,
    Meeting,
    Region,
    Role,
    by_name,
    channels_turned,
    find_convolutions,
    find_heads,
    find_inputs,
    find_matmuls,
    find_tables,
    rotatable_regions,
)
from qpass.analyze.regions import name_of, use_names
from qpass.ir import Program, read
from qpass.plan.pairs import choose_pairs
from qpass.plan.plan import Declined, Online, Paired, Plan, Quantized, Rotated
from qpass.plan.recipe import CALIBRATED, Recipe
from qpass.plan.recipe import Role as Storage
from qpass.rotations import ROTATIONS, Group, Transform
from qpass.rounding import ROUNDINGS, Statistic, without_data

# the relative output error of each site under a plan, measured or predicted
Errors = Callable[[Plan], Mapping[str, float]]
# beyond it, what pairs of outputs cost together does not fit in memory: vocabularies
WIDEST_OUTPUTS = 2**13


def choose(
    program: Program,
    recipe: Recipe,
    *,
    held: Collection[str] = (),
    refusals: Mapping[str, str] | None = None,
    stored: bool = False,
    pairs: bool = False,
    convolutions: bool = False,
    errors: Errors | None = None,
    calibrated: bool = False,
) -> Plan:
    """Plan `recipe` for a program whose norms are folded.

    Values named in `held` keep their basis; `refusals` says, by use, why a target can neither
    quantize a weight nor transform the input of its product. With `stored`, a tensor of a module
    has one value for all its uses, so a layer that is called twice changes alike in both calls or
    not at all. With `pairs`, transforms may run between any two nodes, and do where that takes
    fewer than one for each value that products read. With `convolutions`, the channels that these
    read are transformed where no region reaches them: as nothing quantizes them, only who wants all
    inputs rotated gains by that. With `rotation = "auto"`, `errors` decides,
    region by region and site by site; a plan without rotations is always a candidate. `calibrated`
    says that roundings will have data.
    """
    recipe = recipe.settled(calibrated=calibrated)
    sites = _Sites.of(program, held, refusals or {})
    quantized, declined = _quantize(sites, recipe)
    plan = Plan(recipe, quantized=quantized, declined=declined)
    if recipe.rotation == "off":
        return plan
    rotated, declined = _rotate(sites, recipe, stored=stored)
    covered, turned = sites.covered(rotated), sites.turned()
    paired: tuple[Paired, ...] = ()
    if pairs:
        left = [m for m in sites.matmuls if m.use not in covered | turned]
        left = [m for m in left if not sites.transforms(m)]
        paired = choose_pairs(program, recipe, sites.regions, left, held=held, stored=stored)
        covered |= sites.paired(paired)
    online, more = _online(sites, recipe, covered, turned, convolutions=convolutions)
    full = replace(
        plan,
        rotated=rotated,
        paired=paired,
        online=online,
        declined=(*plan.declined, *declined, *more),
    )
    if recipe.rotation == "on" or errors is None:
        return full
    return _weigh(sites, plan, full, errors, stored=stored)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Sites:
    """The facts that choices are made from."""

    program: Program
    matmuls: tuple[Matmul, ...]
    convolutions: tuple[Convolution, ...]
    heads: frozenset[str]
    regions: tuple[Region, ...]
    refusals: Mapping[str, str]
    inputs: Mapping[str, tuple[Meeting, ...]]

    @staticmethod
    def of(program: Program, held: Collection[str], refusals: Mapping[str, str]) -> _Sites:
        regions = rotatable_regions(program, held=held)
        matmuls = find_matmuls(program)
        convolutions, heads = find_convolutions(program), find_heads(program, matmuls)
        inputs = find_inputs(program)
        return _Sites(program, matmuls, convolutions, heads, regions, refusals, inputs)

    def name(self, matmul: Matmul) -> str:
        return self.program.site(matmul.use)

    def readers(self, region: Region) -> list[Matmul]:
        """The products whose input changes with a region."""
        reading = {(s.use, s.axis) for s in region.sites if s.role is Role.READS}
        return [m for m in self.matmuls if (m.use, m.reads) in reading]

    def reading(self, region: Region) -> dict[str, int]:
        """The weights that are summed over with a region, by use, and the lengths of their axes."""
        return {
            s.use: int(read.shape(self.program.node(s.use))[s.axis])
            for s in region.sites
            if s.role is Role.READS
        }

    def covered(self, rotated: Iterable[Rotated]) -> set[str]:
        """The uses of weights whose input a rotation reaches."""
        names = {choice.region for choice in rotated}
        found = {use for r in self.regions if r.name in names for use in self.reading(r)}
        # what is looked up in a weight is no axis that this is known to read
        axes = {(s.use, s.axis) for r in self.regions if r.name in names for s in r.sites}
        read_by = {use: (use, meetings[0].reads) for use, meetings in self.inputs.items()}
        return found | {use for use, axis in read_by.items() if axis in axes}

    def paired(self, paired: Iterable[Paired]) -> set[str]:
        """The same for regions that turn in part."""
        turned = {name for choice in paired for name in choice.turned}
        uses = use_names(self.program) if turned else {}
        return {
            site.use
            for region in self.regions
            for site in region.sites
            if site.role is Role.READS and name_of(uses.get(site.use, ""), site) in turned
        }

    def turned(self) -> set[str]:
        """The same for regions that a program turns back already, as part of it was turned."""
        return {
            use
            for region in self.regions
            if any(self._turns_back(pin.where) for pin in region.pins)
            for use in self.reading(region)
        }

    def _turns_back(self, name: str) -> bool:
        node = self.program.node(name) if name else None
        if node is None or not read.calls(node, torch.ops.qpass.hadamard.default):
            return False
        signs = self.program.weight(read.value(node, "signs"))
        # the inverse of a transform has its signs behind it
        return signs is not None and bool((signs.evaluate(self.program.sources) == 1).all())

    def holds(self, use: str) -> bool:
        """Whether a transform can stand in front of all products of a weight."""
        seams, found = self.program.seams, self.inputs.get(use)
        if seams is None or found is None:
            return False
        return all((m.value, m.node, False) in seams for m in found)

    def others(self) -> dict[str, int]:
        """The uses of weights of other products that a transform can stand in front of; widths."""
        plain = {matmul.use for matmul in self.matmuls}
        return {
            use: int(read.shape(self.program.node(use))[found[0].reads])
            for use, found in self.inputs.items()
            if use not in plain and self.holds(use)
        }

    def transforms(self, product: Matmul | Convolution) -> bool:
        """Whether a layer transforms its input itself."""
        if isinstance(product, Convolution):
            return channels_turned(self.program, product) is not None
        value = self.program.node(product.value)
        return read.calls(value, torch.ops.qpass.hadamard.default)

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
        size = sites.shape(matmul)
        if (why := spec.supports(size)) is not None:
            declined.append(Declined(name, f"quantized per channel: {why}"))
            spec = spec.per_channel()
        activation = recipe.activation
        if activation is not None and (why := activation.supports((1, size[1]))):
            declined.append(Declined(name, f"input quantized per token: {why}"))
            activation = activation.per_channel()
        rounding = recipe.rounding
        if Statistic.OUTPUT_HESSIAN in ROUNDINGS[rounding].needs and size[0] > WIDEST_OUTPUTS:
            declined.append(Declined(name, f"rounded by {CALIBRATED}: it has {size[0]} outputs"))
            rounding = CALIBRATED
        quantized.append(Quantized(name, storage, spec, activation, rounding))
    declined += _left(sites, recipe)
    if (spec := recipe.spec(Storage.EMBEDDING)) is not None:
        for use in find_tables(sites.program):
            name = sites.program.site(use)
            if (why := sites.refusals.get(use)) is not None:
                declined.append(Declined(name, f"not quantized: {why}"))
                continue
            # no product reads a table, so there is nothing that calibration could measure
            rounding = without_data(recipe.rounding)
            quantized.append(Quantized(name, Storage.EMBEDDING, spec, None, rounding))
    return _once(quantized), tuple(declined)


def _left(sites: _Sites, recipe: Recipe) -> Iterator[Declined]:
    """The weights of products that multiply by more than a matrix, which stay float."""
    plain, program = {matmul.use for matmul in sites.matmuls}, sites.program
    products = [found[0] for use, found in sites.inputs.items() if use not in plain]
    for product in (*products, *sites.convolutions) if recipe.weight is not None else ():
        use, operator = program.node(product.use), program.node(product.node).target
        why = f"not quantized: {operator} multiplies by it, a weight of {len(read.shape(use))} axes"
        yield Declined(program.site(product.use), why)


def _once(quantized: Iterable[Quantized]) -> tuple[Quantized, ...]:
    """One entry per site: a module called twice is one site with two uses."""
    return tuple({q.site: q for q in quantized}.values())


def _rotate(
    sites: _Sites, recipe: Recipe, *, stored: bool
) -> tuple[tuple[Rotated, ...], tuple[Declined, ...]]:
    rotated: list[Rotated] = []
    declined: list[Declined] = []
    free = {use for region in sites.regions if region.free for use in sites.reading(region)}
    for region in sites.regions:
        readers = sites.reading(region)
        if region.width < 2 or not readers:
            continue
        if region.pins and free.issuperset(readers):
            # another factor of the same axis turns, which is all the readers need
            continue
        if region.pins:
            why = f"{region.pins[0].why} ({region.pins[0].where})"
            declined.append(Declined(region.name, f"not rotated: {why}"))
            continue
        if recipe.keep_tied and (shared := _tied(sites.program, region)) is not None:
            declined.append(Declined(region.name, f"not rotated: {shared} is tied"))
            continue
        partial = any(length != region.width for length in readers.values())
        rotation = recipe.value if partial else recipe.residual
        lifted = region.group is Group.ORTHOGONAL_ONES
        if (why := ROTATIONS[rotation].supports(region.width)) is not None:
            declined.append(Declined(region.name, f"not rotated: {why}"))
            continue
        transform = Transform(rotation, region.width, recipe.seed, region.heads, lifted)
        rotated.append(Rotated(region.name, transform))
    if stored:
        kept, split = _alike(sites, rotated)
        return kept, (*declined, *split)
    return tuple(rotated), tuple(declined)


def _alike(
    sites: _Sites, rotated: Iterable[Rotated]
) -> tuple[tuple[Rotated, ...], tuple[Declined, ...]]:
    """The rotations that together change each stored tensor alike in all its uses, or not at all.

    A layer that is called twice has a region for each call, and these turn by one transform.
    """
    owners, regions = sites.program.owners, by_name(sites.regions)
    uses: dict[str, list[str]] = {}
    for use, owner in owners.items():
        uses.setdefault(owner.path, []).append(use)
    kept, declined = list(rotated), list[Declined]()
    while True:
        changed = {
            (site.use, site.axis, site.block, choice.transform)
            for choice in kept
            for site in regions[choice.region].sites
        }
        split = {
            choice.region: owners[site.use].path
            for choice in kept
            for site in regions[choice.region].sites
            if site.use in owners
            for use in uses[owners[site.use].path]
            if (use, site.axis, site.block, choice.transform) not in changed
        }
        if not split:
            return tuple(kept), tuple(declined)
        why = "not rotated: {} is used twice and would change in one place only"
        declined += [Declined(region, why.format(path)) for region, path in split.items()]
        kept = [choice for choice in kept if choice.region not in split]


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
    sites: _Sites,
    recipe: Recipe,
    covered: Collection[str],
    turned: Collection[str],
    *,
    convolutions: bool,
) -> tuple[tuple[Online, ...], tuple[Declined, ...]]:
    online: list[Online] = []
    others = sites.others()
    convolved = {c.use: c for c in sites.convolutions} if convolutions else {}
    plain = {m.use for m in sites.matmuls}
    declined = _unreached(sites, {*covered, *plain, *others, *convolved})
    widths = {m.use: sites.shape(m)[1] for m in sites.matmuls if not sites.transforms(m)}
    widths |= others
    widths |= {use: c.width for use, c in convolved.items() if not sites.transforms(c)}
    for use, width in widths.items():
        if use in covered:
            continue
        name = sites.program.site(use)
        why = None if sites.holds(use) else sites.refusals.get(use)
        why = why or ROTATIONS[recipe.online].supports(width)
        why = "an earlier run rotated it" if use in turned else why
        transform = Transform(recipe.online, width, recipe.seed)
        if why is None and transform.fast() is None:
            why = f"{recipe.online} has no fast form"
        if width == 1 and use in convolved:
            why = "a group of one channel has nothing to mix"
        if why is not None:
            declined.append(Declined(name, f"its input is not rotated: {why}"))
        elif width > 1:
            online.append(Online(name, transform))
    return tuple({o.site: o for o in online}.values()), tuple(declined)


def _unreached(sites: _Sites, known: Collection[str]) -> list[Declined]:
    """Weights of products that no online transform is made for, where no rotation reaches them."""
    found: dict[str, Declined] = {}
    for region in sites.regions:
        why = f"{region.pins[0].why} ({region.pins[0].where})" if region.pins else "left as it is"
        for use in sites.reading(region).keys() - known:
            name = sites.program.site(use)
            found.setdefault(name, Declined(name, f"its input is not rotated: {why}"))
    return list(found.values())


def _weigh(sites: _Sites, plain: Plan, full: Plan, errors: Errors, *, stored: bool) -> Plan:
    """Keep each rotation that lowers the summed error of the sites it changes the input of."""
    before, after = errors(plain), errors(full)

    def gains(names: Iterable[str]) -> bool:
        known = [n for n in names if n in before and n in after]
        return sum(after[n] for n in known) < sum(before[n] for n in known)

    readers = {r.name: [sites.name(m) for m in sites.readers(r)] for r in sites.regions}
    rotated = tuple(r for r in full.rotated if gains(readers[r.region]))
    if stored:
        rotated, _ = _alike(sites, rotated)
    online = tuple(o for o in full.online if gains((o.site,)))
    reached = {p: [sites.program.site(use) for use in sites.paired((p,))] for p in full.paired}
    paired = tuple(p for p in full.paired if gains(reached[p]))
    mixed = replace(full, rotated=rotated, online=online, paired=paired)
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
