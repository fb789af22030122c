"""Under which largest groups may each axis change, and what refuses it the next larger ones?"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import final

import torch

from qpass.analyze.regions import Bound, Region, Site, find_regions
from qpass.ir import Block, Program
from qpass.rotations import Group

_PLANES = frozenset({Group.PLANE_ROTATIONS, Group.PLANE_SCALES, Group.ROPE_PLANES})


def largest_regions(program: Program, *, held: Collection[str] = ()) -> tuple[Region, ...]:
    """Every region that is free, under the largest groups that admit it, then all that is pinned.

    The groups are no ladder: axes may be free under one group together with some weights, and
    under another with others. `bounds` says what pins a region under each next larger group. What
    no group admits is in regions of the group IDENTITY. Values named in `held` keep their basis.
    """
    solved = {
        group: _Solved(find_regions(program, group, held=held))
        for group in Group
        if group is not Group.IDENTITY
    }
    free = [
        replace(region, bounds=tuple(_bounds(region, solved)))
        for group in sorted(solved, key=_many_below)
        for region in solved[group].free
        if not _granted_more(region, solved)
    ]
    taken = _Solved(free)
    pinned = [
        replace(region, group=Group.IDENTITY)
        for region in solved[Group.PERMUTATION].regions
        if not region.free and not all(map(taken.overlaps, region.sites))
    ]
    return (*free, *(replace(r, bounds=tuple(_bounds(r, solved))) for r in pinned))


@final
class _Solved:
    """The regions of one group, by the axes of weights that they change."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = tuple(regions)
        # a plane takes two coordinates
        self.free = tuple(
            r for r in self.regions if r.free and not (r.group in _PLANES and r.width % 2)
        )
        self._at: dict[tuple[str, int], list[tuple[Block, Region]]] = {}
        for region in self.regions:
            for site in region.sites:
                self._at.setdefault((site.use, site.axis), []).append((site.block, region))

    def around(self, site: Site) -> Iterator[Region]:
        """The regions whose change acts on all coordinates of a site at once."""
        for block, region in self._at.get((site.use, site.axis), ()):
            if _within(site.block, block):
                yield region

    def overlaps(self, site: Site) -> bool:
        """Whether a region changes the coordinates of a site, or each of several groups of them."""
        found = self._at.get((site.use, site.axis), ())
        return any(_within(site.block, b) or _within(b, site.block) for b, _ in found)


def _many_below(group: Group) -> int:
    return -sum(other <= group for other in Group)


def _granted_more(region: Region, solved: dict[Group, _Solved]) -> bool:
    """Whether larger groups act freely on all that the region changes."""
    larger = [found for group, found in solved.items() if region.group < group]
    return all(
        any(other.free for found in larger for other in found.around(site)) for site in region.sites
    )


def _bounds(region: Region, solved: dict[Group, _Solved]) -> Iterator[Bound]:
    """What pins any of the region's sites under each of the next larger groups."""
    for group in region.group.next_larger:
        found = solved[group]
        others = dict.fromkeys(other for site in region.sites for other in found.around(site))
        pins = dict.fromkeys(pin for other in others for pin in other.pins)
        if pins:
            yield Bound(group, tuple(pins))


# layers are alike, and so are the few pairs of blocks that are met
@functools.lru_cache(maxsize=1024)
def _within(inner: Block, outer: Block) -> bool:
    """Whether each group of coordinates that changes alike lies in one such group of `outer`."""
    if inner == outer:
        return True
    rows, others = (block.indices().flatten(0, 1) for block in (inner, outer))
    owner = torch.full((int(max(rows.max(), others.max())) + 1,), -1, dtype=torch.int64)
    owner[others] = torch.arange(len(others)).unsqueeze(1)
    owners = owner[rows]
    return bool((owners >= 0).all() and (owners == owners[:, :1]).all())
