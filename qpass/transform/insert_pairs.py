"""Turn a region in part: weights absorb the change, and pairs of transforms join it to the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.analyze import by_name, find_regions
from qpass.analyze.parts import find_parts
from qpass.ir import ChangeBasis, Contract, Note, Pass, Program, edit
from qpass.plan import Paired
from qpass.plan.pairs import Placement, place
from qpass.rotations import Group
from qpass.transform.turn import turned


@final
@dataclass(frozen=True)
class InsertPairs(Pass):
    """Carry out pairs: where they stand in this program follows from the weights that turn."""

    choices: tuple[Paired, ...]
    name: str = "insert_pairs"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        notes: list[Note] = []
        for choice in self.choices:
            for placement in find_placements(program, choice):
                if isinstance(placement, str):
                    notes.append(Note(False, choice.region, placement))
                    continue
                _carry_out(program, placement, choice)
                notes.append(Note(True, choice.region, choice.why))
        return notes


def find_placements(program: Program, choice: Paired) -> list[Placement | str]:
    """Where the pairs of a choice stand in each region that it names, or why they cannot."""
    transform = choice.transform
    group = Group.ORTHOGONAL_ONES if transform.lifted else Group.ORTHOGONAL
    # plans name the regions of the smaller group, which are the larger regions
    regions = by_name(find_regions(program, Group.ORTHOGONAL_ONES))
    named = {id(r): r for name in (choice.region, *choice.turned) if (r := regions.get(name))}
    if not named:
        return ["there is no such region"]
    found: list[Placement | str] = []
    for parts in find_parts(program, named.values(), group):
        if (width := parts.region.width) != transform.width:
            found.append(f"the region is {width} wide, the transform {transform.width}")
            continue
        found.append(place(program, parts, choice) or "some of its weights cannot turn")
    return found


def _carry_out(program: Program, placement: Placement, choice: Paired) -> None:
    transform = choice.transform
    for i in sorted(placement.turned):
        for site in placement.parts.parts[i].sites:
            step = ChangeBasis(transform, site.axis, site.block)
            program.weights[site.use] = program.weights[site.use].then(step)
    for values, inverse in ((placement.forward, False), (placement.back, True)):
        for name, readers in values.items():
            value = program.node(name)
            whole = name in placement.whole
            made = turned(program, value, transform, inverse=inverse, made=whole)
            for reader in readers:
                edit.redirect(program.node(reader), value, made)
