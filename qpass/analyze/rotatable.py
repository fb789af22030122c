"""Which regions can turn, each under the larger of the two orthogonal groups that admits it."""

from __future__ import annotations

from collections.abc import Collection

from qpass.analyze.regions import Region, Site, find_regions
from qpass.ir import Program
from qpass.rotations import Group


def rotatable_regions(program: Program, *, held: Collection[str] = ()) -> tuple[Region, ...]:
    """Every region once: free under O(n), else free under its subgroup that fixes all-ones.

    What is pinned under both is described by the smaller group, whose pins are the real obstacles.
    Values named in `held` keep their basis.
    """
    plain = find_regions(program, Group.ORTHOGONAL, held=held)
    lifted = find_regions(program, Group.ORTHOGONAL_ONES, held=held)
    chosen = [r for r in plain if r.free]
    for wanted in (True, False):
        taken = {_place(s) for r in chosen for s in r.sites}
        chosen += [
            r for r in lifted if r.free is wanted and not any(_place(s) in taken for s in r.sites)
        ]
    return tuple(chosen)


def _place(site: Site) -> tuple[object, ...]:
    return site.use, site.axis, site.block
