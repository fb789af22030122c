"""Which values may be expressed in another basis, and which weights absorb the change."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze.atoms import Atom, Placement, Power
from qpass.analyze.constraints import Constraints, Pin, Role
from qpass.analyze.solution import Solution, Span, collect
from qpass.ir import Block, Program, read
from qpass.rotations import Group


@final
@dataclass(frozen=True, slots=True)
class Site:
    """One axis of one use of a weight that absorbs a region's change of basis.

    It changes by that `power` of the region's matrix: 1, -1 for the inverse transpose, or, where
    the region is positive and diagonal, any other.
    """

    use: str
    axis: int
    block: Block
    role: Role
    power: Power

    @property
    def dual(self) -> bool:
        return self.power < 0


@final
@dataclass(frozen=True, slots=True)
class Bound:
    """What pins a region under a group that is larger than its own."""

    group: Group
    pins: tuple[Pin, ...]


@final
@dataclass(frozen=True, slots=True)
class Region:
    """Axes that change basis together under `group`; free when nothing pins it.

    With `heads` above 1 the change is a direct sum: each head may have a matrix of its own. A
    region goes by any of its `names`, slices of weights that no other region shares: graphs of the
    same model that hold different weights, or in another order, still name it alike. `bounds`,
    where they were asked for, say why it is free under no larger group.
    """

    names: tuple[str, ...]
    group: Group
    width: int
    heads: int
    sites: tuple[Site, ...]
    spans: tuple[Span, ...]
    pins: tuple[Pin, ...]
    bounds: tuple[Bound, ...] = ()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def free(self) -> bool:
        return not self.pins


def by_name(regions: Iterable[Region]) -> dict[str, Region]:
    """The regions under each of their names."""
    return {name: region for region in regions for name in region.names}


def find_regions(
    program: Program, group: Group, *, held: Collection[str] = ()
) -> tuple[Region, ...]:
    """Solve for `group`: every region that a weight and a value take part in, in graph order.

    Graph inputs and outputs keep their basis, and so do the values named in `held`.
    """
    return _regions(collect(program, group, held=held))


def _regions(c: Constraints) -> tuple[Region, ...]:
    solution = Solution(c)
    placed, uses = solution.placed, use_names(c.program)
    regions: list[Region] = []
    for leaf in solution.leaves:
        if leaf not in placed.sites or leaf not in placed.spans:
            continue
        head = solution.head(leaf)
        made = [site_of(c, use, axis, place, head) for use, axis, place in placed.sites[leaf]]
        regions.append(
            Region(
                names=_names(c.program, uses, made),
                group=c.group,
                width=int(leaf.size),
                heads=1 if head is None else int(head.size),
                sites=tuple(made),
                spans=tuple(dict.fromkeys(placed.spans[leaf])),
                pins=tuple(dict.fromkeys(solution.pins.get(leaf, ()))),
            )
        )
    return tuple(regions)


def use_names(program: Program) -> dict[str, str]:
    """What each use of a weight is called: `path`, and `path@1`, `path@2`, ... as in the trace."""
    names: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for node in program.graph.nodes:
        if program.weight(node) is not None:
            path = program.site(node.name)
            names[node.name] = f"{path}@{calls[path]}" if calls[path] else path
            calls[path] += 1
    return names


def _names(program: Program, uses: Mapping[str, str], sites: Iterable[Site]) -> tuple[str, ...]:
    """What a region is called: by matrices before vectors, by what writes it before what reads."""

    def order(site: Site) -> tuple[object, ...]:
        vector = len(read.shape(program.node(site.use))) < 2
        parts = re.split(r"(\d+)", uses[site.use])
        numbered = tuple((int(p), "") if p.isdigit() else (-1, p) for p in parts)
        return vector, site.role is Role.READS, numbered, site.axis, site.block.offset

    ordered = sorted(sites, key=order)
    return tuple(dict.fromkeys(name_of(uses[site.use], site) for site in ordered))


def name_of(use: str, site: Site) -> str:
    """A region as a slice of a weight."""
    start, stride = site.block.offset, site.block.strides[-1]
    span = f"{start}:{start + site.block.width * stride}" + (f":{stride}" if stride > 1 else "")
    return f"{use}[{', '.join([':'] * site.axis + [span])}]"


def site_of(c: Constraints, node: fx.Node, axis: int, place: Placement, head: Atom | None) -> Site:
    sizes: list[int] = []
    strides: list[int] = []
    at: int | None = None
    for atom, size, stride in place.around:
        if atom is head:
            at = len(sizes)
        sizes.append(int(size))
        strides.append(int(stride or 0))
    block = Block(
        place.offset,
        (*sizes, int(place.leaf.atom.size)),
        (*strides, int(place.stride or 0)),
        at,
    )
    role = Role.READS if (node, axis) in c.reads else Role.WRITES
    return Site(node.name, axis, block, role, place.leaf.power)
