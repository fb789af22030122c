"""Integers that are numbers of entries of an axis: where the entries move, they are renumbered.

A router picks experts by number, and rows are sorted by what it picked. Permuting the experts
renumbers what is picked and puts sorted rows elsewhere; once they are back in their first places,
nothing has changed. The order of sorted rows is nobody's choice: it *follows* the axes that it is
made of, and what pins it pins those.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import final

from torch import fx

from qpass.analyze.atoms import Axis


class Kind(enum.Enum):
    """What an integer says about an axis."""

    NUMBERS = "each is the number of an entry"
    MARKS = "one where an entry has that number, along the last axis, and zero elsewhere"
    COUNTS = "how often each entry's number occurs"
    ENDS = "where the places of each entry's number end, once they are sorted"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """What the entries of a value say about `axis`.

    Values with the same `root` hold the same numbers, in other places or counted. `once` if every
    entry of the axis is named exactly once.
    """

    axis: Axis
    root: fx.Node
    kind: Kind = Kind.NUMBERS
    once: bool = False


@final
@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """`axis` is in an order that follows from the order of the axes `after`.

    With `rows`, each of their entries has an order of its own. If there is a `root`, its numbers
    are in ascending order along the axis.
    """

    axis: Axis
    after: tuple[Axis, ...]
    where: str
    rows: tuple[Axis, ...] = ()
    root: fx.Node | None = None
