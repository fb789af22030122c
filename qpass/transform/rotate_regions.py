"""Rotate free regions: every writer and reader of a region takes its half of the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.analyze import Region, by_name, find_regions
from qpass.ir import ChangeBasis, Contract, Note, Pass, Program
from qpass.plan import Rotated
from qpass.rotations import Group


@final
@dataclass(frozen=True)
class RotateRegions(Pass):
    """Fold the chosen transforms into the weights; a region that is not free is declined."""

    choices: tuple[Rotated, ...]
    name: str = "rotate_regions"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        for lifted in (False, True):
            chosen = [c for c in self.choices if c.transform.lifted is lifted]
            if not chosen:
                continue
            group = Group.ORTHOGONAL_ONES if lifted else Group.ORTHOGONAL
            regions = by_name(find_regions(program, group))
            # plans of several graphs may call one region by two of its names
            once = {r.name if (r := regions.get(c.region)) else c.region: c for c in chosen}
            notes += [_rotate(program, regions.get(c.region), c) for c in once.values()]
        return notes


def _rotate(program: Program, region: Region | None, choice: Rotated) -> Note:
    transform = choice.transform
    if region is None:
        return Note(False, choice.region, "there is no such region")
    if region.pins:
        return Note(False, choice.region, f"{region.pins[0].why} ({region.pins[0].where})")
    if (region.width, region.heads) != (transform.width, transform.heads) and (
        region.width != transform.width or transform.heads != 1
    ):
        return Note(
            False,
            choice.region,
            f"the region is {region.heads} x {region.width}, "
            f"the transform {transform.heads} x {transform.width}",
        )
    for site in region.sites:
        step = ChangeBasis(transform, site.axis, site.block)
        program.weights[site.use] = program.weights[site.use].then(step)
    return Note(True, choice.region, f"{transform.rotation} into {len(region.sites)} weights")
