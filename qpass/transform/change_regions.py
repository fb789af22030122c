"""Change regions by given elements: scales, permutations and other invertible matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.analyze import Region, by_name, find_regions
from qpass.ir import ChangeBasis, Contract, Note, Pass, Program
from qpass.plan import Changed
from qpass.plan.fits import refusal


@final
@dataclass(frozen=True)
class ChangeRegions(Pass):
    """Fold the chosen elements into the weights; one that its region does not allow is declined."""

    choices: tuple[Changed, ...]
    name: str = "change_regions"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        for group in dict.fromkeys(choice.group for choice in self.choices):
            regions = by_name(find_regions(program, group))
            chosen = [choice for choice in self.choices if choice.group is group]
            # plans of several graphs may call one region by two of its names
            once = {r.name if (r := regions.get(c.region)) else c.region: c for c in chosen}
            notes += [_change(program, regions.get(c.region), c) for c in once.values()]
        return notes


def _change(program: Program, region: Region | None, choice: Changed) -> Note:
    if region is None:
        return Note(False, choice.region, "there is no such region")
    if (why := refusal(region, choice)) is not None:
        return Note(False, choice.region, why)
    for site in region.sites:
        step = ChangeBasis(choice.element, site.axis, site.block, power=site.power)
        program.weights[site.use] = program.weights[site.use].then(step)
    return Note(True, choice.region, f"{choice.element.rotation} into {len(region.sites)} weights")
