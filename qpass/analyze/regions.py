"""Which values may be expressed in another basis, and which weights absorb the change."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze.atoms import Atom, Axis, Placement, placements
from qpass.analyze.constraints import Constraints, Pin, Role
from qpass.analyze.rules.base import find_rule
from qpass.ir import Block, Program, read
from qpass.rotations import Group


@final
@dataclass(frozen=True, slots=True)
class Site:
    """One axis of one use of a weight that absorbs a region's change of basis."""

    use: str
    axis: int
    block: Block
    role: Role
    dual: bool


@final
@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a graph value that changes with a region."""

    value: str
    axis: int


@final
@dataclass(frozen=True, slots=True)
class Region:
    """Axes that change basis together under `group`; free when nothing pins it.

    With `heads` above 1 the change is a direct sum: each head may have a matrix of its own.
    """

    name: str
    group: Group
    width: int
    heads: int
    sites: tuple[Site, ...]
    spans: tuple[Span, ...]
    pins: tuple[Pin, ...]

    @property
    def free(self) -> bool:
        return not self.pins


def find_regions(
    program: Program, group: Group, *, held: Collection[str] = ()
) -> tuple[Region, ...]:
    """Solve for `group`: every region that a weight and a value take part in, in graph order.

    Graph inputs and outputs keep their basis, and so do the values named in `held`.
    """
    return _regions(collect(program, group, held=held))


def collect(
    program: Program, group: Group, *, held: Collection[str] = (), boundary: bool = True
) -> Constraints:
    """What the rules say about a program; without a `boundary`, inputs and outputs are free."""
    c = Constraints(program, group)
    for node in program.graph.nodes:
        c.node = node
        if node.op == "output":
            for returned in node.all_input_nodes:
                if boundary and returned in c.layouts:
                    c.pin_all(returned, "the graph returns it")
        elif node.op == "placeholder":
            if read.fake(node) is not None:
                c.give_fresh(node)
                if boundary and node.name not in program.weights:
                    c.pin_all(node, "the graph receives it")
        elif node.op == "call_function":
            _apply(node, c)
            if node.name in held and node in c.layouts:
                c.pin_all(node, "a cache may hold it")
    return c


def _apply(node: fx.Node, c: Constraints) -> None:
    if (rule := find_rule(node.target)) is not None:
        rule(node, c)
        return
    why = f"{read.target_name(node)} has no rule"
    for touched in node.all_input_nodes:
        if touched in c.layouts:
            c.pin_all(touched, why)
    if read.fake(node) is not None:
        c.give_fresh(node)
        c.pin_all(node, why)


@final
class Solution:
    """What the rules' events say about each leaf, once every atom is split as far as it will be."""

    def __init__(self, c: Constraints) -> None:
        self.placed = _Placed(c)
        self.pins: dict[Atom, list[Pin]] = {}
        for held in c.held:
            for place in placements(held.axis):
                self.pins.setdefault(place.leaf.atom, []).append(held.pin)
        self._mixed = [
            (_leaves(layout[i]), frozenset[Atom]().union(*(_leaves(a) for a in layout)))
            for layout, i in c.mixed
        ]

    @property
    def leaves(self) -> tuple[Atom, ...]:
        """Every leaf of a real tensor that has more than one coordinate."""
        found = dict.fromkeys((*self.placed.sites, *self.placed.spans))
        return tuple(leaf for leaf in found if isinstance(leaf.size, int) and leaf.size > 1)

    def head(self, leaf: Atom) -> Atom | None:
        """The factor that may pick a different matrix per entry: present wherever the leaf is."""
        candidates = [
            atom
            for atom in self.placed.company.get(leaf, ())
            if isinstance(atom.size, int)
            and not any(
                atom in axis and leaf in value and leaf not in axis for axis, value in self._mixed
            )
        ]
        return max(candidates, key=lambda atom: int(atom.size), default=None)  # type: ignore[arg-type]


def solve(c: Constraints) -> Solution:
    """Resolve what was collected to leaves."""
    return Solution(c)


def _regions(c: Constraints) -> tuple[Region, ...]:
    solution = Solution(c)
    placed = solution.placed
    regions: list[Region] = []
    for leaf in solution.leaves:
        if leaf not in placed.sites or leaf not in placed.spans:
            continue
        head = solution.head(leaf)
        made = [_site(c, use, axis, place, head) for use, axis, place in placed.sites[leaf]]
        regions.append(
            Region(
                name=_name(c.program, made[0]),
                group=c.group,
                width=int(leaf.size),
                heads=1 if head is None else int(head.size),
                sites=tuple(made),
                spans=tuple(dict.fromkeys(placed.spans[leaf])),
                pins=tuple(dict.fromkeys(solution.pins.get(leaf, ()))),
            )
        )
    return tuple(regions)


def _name(program: Program, site: Site) -> str:
    """The region as a slice of its first weight, which no other region shares.

    A layer that is called again is `path@1`, `path@2`, ... as in the trace.
    """
    path = program.site(site.use)
    uses = [n.name for n in program.graph.nodes if program.weight(n) is not None]
    call = [use for use in uses if program.site(use) == path].index(site.use)
    start, stride = site.block.offset, site.block.strides[-1]
    span = f"{start}:{start + site.block.width * stride}" + (f":{stride}" if stride > 1 else "")
    again = f"@{call}" if call else ""
    return f"{path}{again}[{', '.join([':'] * site.axis + [span])}]"


class _Placed:
    """Every leaf, where it lies in weights and values, and which atoms always go with it."""

    def __init__(self, c: Constraints) -> None:
        self.sites: dict[Atom, list[tuple[fx.Node, int, Placement]]] = {}
        self.spans: dict[Atom, list[Span]] = {}
        self.company: dict[Atom, set[Atom]] = {}
        for node, layout in c.layouts.items():
            if not read.is_floating(node):
                continue
            is_weight = c.program.weight(node) is not None
            axes = [list(placements(axis)) for axis in layout]
            whole = [[p.leaf.atom for p in axis if not p.partial] for axis in axes]
            for i, axis in enumerate(axes):
                beside = [a for j, w in enumerate(whole) if j != i and not is_weight for a in w]
                for place in axis:
                    self._place(node, i, place, beside, is_weight=is_weight)

    def _place(
        self, node: fx.Node, axis: int, place: Placement, beside: list[Atom], *, is_weight: bool
    ) -> None:
        leaf = place.leaf.atom
        if is_weight:
            self.sites.setdefault(leaf, []).append((node, axis, place))
        else:
            self.spans.setdefault(leaf, []).append(Span(node.name, axis))
        around = [atom for atom, _, _ in place.around if atom.parts is None] + beside
        # an atom met twice beside the leaf could not say which of the two picks the matrix
        company = {atom for atom in around if around.count(atom) == 1 and atom is not leaf}
        known = self.company.get(leaf)
        self.company[leaf] = company if known is None else known & company


def _leaves(axis: Axis) -> frozenset[Atom]:
    return frozenset(place.leaf.atom for place in placements(axis))


def _site(c: Constraints, node: fx.Node, axis: int, place: Placement, head: Atom | None) -> Site:
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
    return Site(node.name, axis, block, role, place.leaf.dual)
