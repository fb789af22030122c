"""What of a region still turns together when it may change basis between a value and its readers.

The rules are applied as ever, but each node reads a copy of the axis that it is given, tied to
nothing: what they then tie are the parts of a region that no pair of transforms can take apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import final

from qpass.analyze.atoms import Atom, Axis, fresh, placements
from qpass.analyze.constraints import Constraints, Pin
from qpass.analyze.regions import Region, Site, name_of, site_of, use_names
from qpass.analyze.solution import Solution, Span, visit
from qpass.ir import Program, read
from qpass.rotations import Group


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Axes that turn together whatever stands between nodes; `names` are slices of the weights."""

    sites: tuple[Site, ...]
    names: tuple[str, ...]
    spans: tuple[Span, ...]
    pins: tuple[Pin, ...]


@final
@dataclass(frozen=True, slots=True)
class Value:
    """A value whose last axis is a region: the part that makes it, and that of each reader."""

    name: str
    made: int
    readers: tuple[tuple[str, int], ...]


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a region, by number, and the values between them."""

    region: Region
    parts: tuple[Part, ...]
    values: tuple[Value, ...]


def find_parts(
    program: Program, regions: Iterable[Region], group: Group, *, held: Collection[str] = ()
) -> tuple[Parts, ...]:
    """Take regions apart, in one solution for `group`; see `find_regions` for `held`."""
    chosen = tuple(regions)
    cuts = {name: region for region in chosen for name in _whole(program, region)}
    c = Constraints(program, group)
    copies: dict[tuple[str, str], Axis] = {}
    for node in program.graph.nodes:
        read_by = {v: c.layouts[v] for v in node.all_input_nodes if v.name in cuts}
        for value, layout in read_by.items():
            copy = copies[value.name, node.name] = fresh(cuts[value.name].width)
            c.layouts[value] = (*layout[:-1], copy)
        visit(node, c, held=held)
        c.layouts |= read_by
    found = _Found(c, Solution(c), copies)
    return tuple(found.parts(region) for region in chosen)


def _whole(program: Program, region: Region) -> tuple[str, ...]:
    """The values whose last axis is the region, all of it."""
    found: dict[str, None] = {}
    for span in region.spans:
        shape = read.shape(program.node(span.value))
        if span.axis == len(shape) - 1 and shape[-1] == region.width:
            found[span.value] = None
    return tuple(found)


@final
class _Found:
    """The solution of a program whose values are read as copies."""

    def __init__(
        self, c: Constraints, solution: Solution, copies: dict[tuple[str, str], Axis]
    ) -> None:
        self._c = c
        self._solution = solution
        self._copies = copies
        self._uses = use_names(c.program)

    def parts(self, region: Region) -> Parts:
        program = self._c.program
        numbers: dict[object, int] = {}
        parts: list[Part] = []

        def number(axis: Axis, where: str) -> int:
            leaf = _leaf(axis)
            key = where if leaf is None else leaf
            if key not in numbers:
                numbers[key] = len(parts)
                parts.append(self._part(leaf, where))
            return numbers[key]

        values: list[Value] = []
        for name in _whole(program, region):
            node = program.node(name)
            made = number(self._c.layouts[node][-1], name)
            readers = tuple(
                (user.name, number(self._copies[name, user.name], user.name)) for user in node.users
            )
            values.append(Value(name, made, readers))
        return Parts(region, tuple(parts), tuple(values))

    def _part(self, leaf: Atom | None, where: str) -> Part:
        if leaf is None:
            return Part((), (), (), (Pin("its entries are regrouped", where),))
        placed, pins = self._solution.placed, self._solution.pins.get(leaf, ())
        found = placed.sites.get(leaf, ())
        sites = tuple(site_of(self._c, use, axis, place, None) for use, axis, place in found)
        names = tuple(name_of(self._uses[site.use], site) for site in sites)
        spans = tuple(dict.fromkeys(placed.spans.get(leaf, ())))
        return Part(sites, names, spans, tuple(dict.fromkeys(pins)))


def _leaf(axis: Axis) -> Atom | None:
    """The leaf that an axis is, if it is one and no product or sum."""
    found = list(placements(axis))
    whole = len(found) == 1 and not found[0].partial and not found[0].around
    return found[0].leaf.atom if whole else None
