"""What holds each leaf of a program still, and which factor may pick it a matrix of its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

import torch
from torch import fx

from qpass.analyze.atoms import Atom, Axis, Placement, placements
from qpass.analyze.constraints import Constraints, Pin
from qpass.analyze.diagonals import settle
from qpass.analyze.rules.base import find_rule
from qpass.ir import Program, read
from qpass.rotations import Group

aten = torch.ops.aten


@final
@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a graph value that changes with a region."""

    value: str
    axis: int


def collect(
    program: Program, group: Group, *, held: Collection[str] = (), boundary: bool = True
) -> Constraints:
    """What the rules say about a program; without a `boundary`, inputs and outputs are free."""
    c = Constraints(program, group)
    for node in program.graph.nodes:
        visit(node, c, held=held, boundary=boundary)
    return c


def visit(
    node: fx.Node, c: Constraints, *, held: Collection[str] = (), boundary: bool = True
) -> None:
    """Add what is to be said about one node, whose inputs have been visited."""
    c.node = node
    if node.op == "output":
        for returned in node.all_input_nodes:
            if boundary and returned in c.layouts:
                c.pin_all(returned, "the graph returns it")
    elif node.op == "placeholder":
        if read.fake(node) is not None:
            c.give_fresh(node)
            weight = c.program.weight(node)
            if boundary and weight is None:
                c.pin_all(node, "the graph receives it")
            elif weight is not None and weight.source in c.program.fixed:
                c.pin_all(node, "code makes it, and may make it again")
    else:
        _apply(node, c)
        if node.name in held and node in c.layouts:
            c.pin_all(node, "a cache may hold it")


# operators that look at the shape of a tensor and not at its entries
_SHAPE_ONLY = frozenset(
    {
        aten.sym_size.int,
        aten.sym_numel.default,
        aten.sym_stride.int,
        aten.empty_like.default,
        aten.full_like.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
    }
)


def _apply(node: fx.Node, c: Constraints) -> None:
    if (rule := find_rule(node.target)) is not None:
        rule(node, c)
        return
    why = f"{read.target_name(node)} has no rule"
    for touched in node.all_input_nodes:
        if touched in c.layouts and node.target not in _SHAPE_ONLY:
            c.pin_all(touched, why)
    if read.fake(node) is not None:
        c.give_fresh(node)
        c.pin_all(node, why)


@final
class Solution:
    """What the rules' events say about each leaf, once every atom is split as far as it will be."""

    def __init__(self, c: Constraints) -> None:
        settle(c)
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
