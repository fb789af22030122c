"""Each region turns as it costs least on data, or not at all.

Rotations spread outliers, which short blocks with scales of their own already keep apart: so it
depends on the format, the place and the data whether one helps (Egiazarian et al., Bridging the Gap
Between Promise and Performance for Microscaling FP4 Quantization, 2025, for formats). Candidates
are to leave a region as it is, what the plan has, and rotations within blocks of the formats. An
error costs what it moves the outputs by; those of a region are those of the products that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, final

from qpass.analyze import Region, Role, by_name, find_matmuls, rotatable_regions
from qpass.analyze.regions import name_of, use_names
from qpass.calibrate import gradients
from qpass.ir import Note
from qpass.plan import Online, Paired, Plan, Rotated
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.quantize.errors import SiteErrors
from qpass.rotations import ROTATIONS, Element, Transform
from qpass.search.holdout import Holdout, split
from qpass.search.regions import alike
from qpass.transform import carry_out

CHOICE = "measured"
# sampled rows of each product
ROWS = 256
# what another choice has to gain to be worth it: less is noise of the samples
GAIN = 0.99
_OFF, _START = "off", "start"

T = TypeVar("T", Rotated, Online, Paired)


@final
@dataclass(frozen=True, slots=True)
class Measured(Chooser):
    """Keeps, drops or replaces each rotation of the plan by what errors cost on data."""

    name: str = CHOICE

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        plan = task.plan
        if not plan.quantized:
            return plan, (Note(False, self.name, "nothing is rounded"),)
        if not (plan.rotated or plan.online or plan.paired):
            why = 'nothing turns; ask for it with rotation = "on" or "auto"'
            return plan, (Note(False, self.name, why),)
        candidates = _candidates(plan)
        costs = _costs(task, candidates, self.name)
        mixed = _mixed(task, candidates, costs)
        total = {name: sum(found.values()) for name, found in costs.items()}
        pure = min(total, key=total.__getitem__)
        # few enough to ask held-out data for
        offers = {_START: plan, _OFF: candidates[_OFF], pure: candidates[pure], "mixed": mixed}
        holdout = Holdout(task)
        scores = {name: holdout.score(offer) for name, offer in offers.items()}
        best = min(scores, key=scores.__getitem__)
        if best == _START or offers[best] == plan:
            return plan, (Note(False, self.name, "the start is best on held-out data"),)
        found = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
        return offers[best], (Note(True, self.name, f"{best} is best; held-out errors: {found}"),)


def _candidates(plan: Plan) -> dict[str, Plan]:
    """The start, nothing turned, and every transform by another name, by what they are called."""
    found = {_START: plan, _OFF: replace(plan, rotated=(), online=(), paired=())}
    blocks = {
        spec.block
        for entry in plan.quantized
        for spec in (entry.weight, entry.activation)
        if spec is not None and not isinstance(spec.block, str)
    }
    names = [f"block_hadamard_{block}" for block in sorted(blocks)]
    for name in ("hadamard", *(n for n in names if n in {r.name for r in ROTATIONS})):
        renamed = replace(
            plan,
            rotated=tuple(replace(r, transform=_named(r.transform, name)) for r in plan.rotated),
            online=tuple(
                replace(o, transform=_runs(o.transform, name))
                if isinstance(o.transform, Transform)
                else o
                for o in plan.online
            ),
            paired=tuple(replace(p, transform=_runs(p.transform, name)) for p in plan.paired),
        )
        if renamed not in found.values():
            found[name] = renamed
    return found


def _named(transform: Transform | Element, name: str) -> Transform | Element:
    """The transform by another name where one goes by name and its width allows it."""
    if isinstance(transform, Element) or ROTATIONS[name].supports(transform.width) is not None:
        return transform
    return replace(transform, rotation=name)


def _runs(transform: Transform, name: str) -> Transform:
    """The same for one that runs with the model."""
    renamed = _named(transform, name)
    assert isinstance(renamed, Transform)
    return transform if replace(renamed, lifted=False).fast() is None else renamed


def _costs(task: Task, plans: Mapping[str, Plan], name: str) -> dict[str, Mapping[str, float]]:
    """What the errors of each site cost under each plan."""
    learning, _ = split(task.batches)
    products = {m.node for m in find_matmuls(task.program)}
    costs = gradients.costs(task.program, products, {}, learning, task.plan.recipe.seed).rows
    errors = SiteErrors(
        task.program,
        task.folded,
        learning,
        lambda plan: carry_out(task.program, task.folded, plan).program,
        costs,
        ROWS,
    )
    found: dict[str, Mapping[str, float]] = {}
    for at, (which, plan) in enumerate(plans.items()):
        task.advance(f"{name} rotations", at, len(plans))
        found[which] = errors(plan)
    task.advance(f"{name} rotations", len(plans), len(plans))
    return found


def _mixed(task: Task, plans: Mapping[str, Plan], costs: Mapping[str, Mapping[str, float]]) -> Plan:
    """The plan that takes each choice from the candidate under which its readers cost least."""
    plan, program = task.plan, task.folded
    regions = by_name(rotatable_regions(program))

    def best(sites: Collection[str]) -> str:
        # only what all candidates measure can be compared
        known = [s for s in sites if all(s in found for found in costs.values())]
        cost = {
            name: sum(found[s] for s in known) * (1 if name == _START else 1 / GAIN)
            for name, found in costs.items()
        }
        return min(cost, key=cost.__getitem__)

    taken: dict[str, str] = {}
    for together in alike(program, regions, [r for r in plan.rotated if r.region in regions]):
        choice = best({s for r in together for s in _readers(task, regions[r.region])})
        taken |= {r.region: choice for r in together}
    uses = use_names(program)

    def reached(paired: Paired) -> set[str]:
        return {
            program.site(site.use)
            for region in regions.values()
            for site in region.sites
            if site.role is Role.READS and name_of(uses[site.use], site) in paired.turned
        }

    rotated = _taken(plans, lambda p: p.rotated, lambda r: r.region, taken)
    online = _taken(
        plans, lambda p: p.online, lambda o: o.site, {o.site: best({o.site}) for o in plan.online}
    )
    paired = _taken(
        plans,
        lambda p: p.paired,
        lambda p: p.region,
        {p.region: best(reached(p)) for p in plan.paired},
    )
    return replace(plan, rotated=rotated, online=online, paired=paired)


def _taken(
    plans: Mapping[str, Plan],
    entries: Callable[[Plan], Iterable[T]],
    name: Callable[[T], str],
    choices: Mapping[str, str],
) -> tuple[T, ...]:
    """The entries of each choice's plan; none where that plan has none."""
    return tuple(
        entry
        for which, plan in plans.items()
        for entry in entries(plan)
        if choices.get(name(entry), _START) == which
    )


def _readers(task: Task, region: Region) -> Sequence[str]:
    """The sites of products that read a region."""
    reading = {(s.use, s.axis) for s in region.sites if s.role is Role.READS}
    matmuls = find_matmuls(task.folded)
    return [task.folded.site(m.use) for m in matmuls if (m.use, m.reads) in reading]


CHOOSERS.add(Measured())
