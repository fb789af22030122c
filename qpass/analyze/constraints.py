"""What rules say about a program: which axes change basis together, and what holds them still."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze.atoms import (
    Axis,
    Mismatch,
    Power,
    Size,
    as_one,
    cut,
    empty,
    fresh,
    join,
    length,
    regroup,
    size_of,
    tie,
    twin,
)
from qpass.ir import Program, read
from qpass.rotations import Group

Layout = tuple[Axis, ...]


class Role(enum.Enum):
    """How a weight's axis meets the values: it makes them, or it is contracted with them."""

    WRITES = "writes"
    READS = "reads"


@final
@dataclass(frozen=True, slots=True)
class Pin:
    """Why an axis cannot change basis, and at which value."""

    why: str
    where: str


@final
@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """An event: `axis` is pinned."""

    axis: Axis
    pin: Pin


@final
@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """An event: entry by entry `z = x * y`, so diagonal changes satisfy `T_z = T_x T_y`."""

    x: Axis
    y: Axis
    z: Axis
    node: fx.Node | None


class Constraints:
    """The facts that rules record for one group; `qpass.analyze.regions` solves them."""

    def __init__(self, program: Program, group: Group) -> None:
        self.program = program
        self.group = group
        self.layouts: dict[fx.Node, Layout] = {}
        self.held: list[Held] = []
        self.mixed: list[tuple[Layout, int]] = []
        self.reads: set[tuple[fx.Node, int]] = set()
        self.multiplied: list[Factors] = []
        self.node: fx.Node | None = None

    # -- what rules may ask

    def layout(self, node: fx.Node) -> Layout:
        """The axes of a value."""
        return self.layouts[node]

    def allows(self, *groups: Group) -> bool:
        """Whether the group being solved for lies in one of `groups`."""
        return any(self.group <= group for group in groups)

    # -- what rules may say

    def give(self, node: fx.Node, layout: Sequence[Axis]) -> None:
        """The axes of a value just made; they keep their basis if it holds no real numbers."""
        self.layouts[node] = tuple(layout)
        if not read.is_floating(node):
            self.pin_all(node, "holds no real numbers")

    def give_fresh(self, node: fx.Node) -> Layout:
        """New axes, tied to nothing."""
        layout = tuple(fresh(size_of(s)) for s in read.shape(node))
        self.give(node, layout)
        return layout

    def tie(self, left: Axis, right: Axis, *, power: Power = 1) -> None:
        """The left axis changes as the right one does, or by that power of it.

        -1 is the inverse transpose; others exist for positive diagonal changes only.
        """
        try:
            own_power = tie(left, right, power=power)
        except Mismatch as mismatch:
            self.pin(left, str(mismatch))
            self.pin(right, str(mismatch))
            return
        power_of = "a power" if self.allows(Group.POSITIVE_DIAGONAL) else "the inverse transpose"
        for axis in own_power:
            self.limit(axis, f"meets {power_of} of its own change", Group.ORTHOGONAL)

    def contract(self, left: Layout, i: int, right: Layout, j: int) -> None:
        """Axis `i` of one value and `j` of another are summed over in a product: they are dual."""
        self.tie(left[i], right[j], power=-1)
        self.mix(left, i)
        self.mix(right, j)

    def multiply(self, x: Axis, y: Axis, why: str) -> Axis:
        """The axis of a product of two values entry by entry."""
        if not self.allows(Group.PERMUTATION) and self.allows(Group.DIAGONAL):
            z = twin(x)
            self.multiplied.append(Factors(x, y, z, self.node))
            return z
        self.limit(x, why, Group.PERMUTATION)
        self.limit(y, why, Group.PERMUTATION)
        self.tie(x, y)
        return x

    def absorb(self, weight: fx.Node, axis: int) -> None:
        """`weight` reads on `axis`: it is contracted with values rather than being one."""
        self.reads.add((weight, axis))

    def limit(self, axis: Axis, why: str, *groups: Group) -> None:
        """The axis may change by `groups` only."""
        if not self.allows(*groups):
            self.pin(axis, why)

    def pin(self, axis: Axis, why: str) -> None:
        """The axis keeps its basis."""
        if axis:
            self.held.append(Held(axis, Pin(why, self.node.name if self.node else "")))

    def mix(self, layout: Layout, axis: int) -> None:
        """Entries of an axis mix, so it cannot index different changes of the value's others."""
        self.mixed.append((layout, axis))

    def pin_all(self, node: fx.Node, why: str) -> None:
        """Every axis of a value keeps its basis."""
        for axis in self.layout(node):
            self.pin(axis, why)

    # -- axis arithmetic that pins where there is no structure

    def view(self, source: Layout, shape: Sequence[Size]) -> Layout:
        """The entries of `source` in another shape."""
        if any(map(empty, source)):
            return self._lost(source, shape, "has no entries")
        try:
            return tuple(regroup(source, shape))
        except Mismatch as mismatch:
            return self._regrouped(source, shape, str(mismatch))

    def _regrouped(self, source: Layout, shape: Sequence[Size], why: str) -> Layout:
        """The axes that a view leaves alone at both ends, around others whose structure is lost."""
        sizes = [length(axis) for axis in source]
        same = [a == b for a, b in zip(sizes, shape, strict=False)]
        front = same.index(False) if False in same else len(same)
        i, j = len(source), len(shape)
        back: Layout = ()
        for olds, news in _blocks_from_the_end(sizes[front:], shape[front:]):
            try:
                found = regroup(source[i - olds : i], shape[j - news : j])
            except Mismatch:
                break
            i, j, back = i - olds, j - news, (*found, *back)
        lost = self._lost(source[front:i], shape[front:j], why)
        return (*source[:front], *lost, *back)

    def slice(self, axis: Axis, start: int, stop: int) -> Axis:
        """The entries `start` to `stop` of an axis."""
        if start >= stop:
            return fresh(0)
        try:
            return cut(axis, start, stop)
        except Mismatch as mismatch:
            (lost,) = self._lost((axis,), (stop - start,), str(mismatch))
            return lost

    def concatenate(self, axes: Sequence[Axis], total: Size) -> Axis:
        """Axes one after another; those of no entries add nothing."""
        filled = [axis for axis in axes if not empty(axis)]
        if not filled:
            return fresh(total)
        return filled[0] if len(filled) == 1 else join([as_one(axis) for axis in filled])

    def _lost(self, sources: Sequence[Axis], shape: Sequence[Size], why: str) -> Layout:
        out = tuple(fresh(size) for size in shape)
        for axis in (*sources, *out):
            self.pin(axis, why)
        return out


def _blocks_from_the_end(old: Sequence[Size], new: Sequence[Size]) -> Iterator[tuple[int, int]]:
    """How many axes hold the same entries before and after a view, in blocks from the last one."""
    i, j = len(old), len(new)
    while i and j:
        a, b, olds, news = old[i - 1], new[j - 1], 1, 1
        while a != b:
            # sizes that are not known cannot be told to be the same
            if not (isinstance(a, int) and isinstance(b, int)):
                return
            if a < b and i > olds:
                olds += 1
                a = a * old[i - olds]
            elif b < a and j > news:
                news += 1
                b = b * new[j - news]
            else:
                return
        yield olds, news
        i, j = i - olds, j - news
