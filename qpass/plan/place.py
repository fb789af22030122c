"""Where pairs of a transform and its inverse cost least: a minimum cut between parts.

Each part turns or stays. A value costs a transform if its maker stays and a reader turns, and an
inverse if its maker turns and a reader stays; all its readers share either. As a network, with the
plain side as the source and the turned side as the sink, a value v of maker m and readers r is

    m -> v (its cost) and v -> r (no limit):    cut if m stays and some r turns
    r -> v' (no limit) and v' -> m (its cost):  cut if m turns and some r stays
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

if TYPE_CHECKING:
    import networkx as nx


@final
@dataclass(frozen=True, slots=True)
class Fork:
    """A value: the part that makes it, those that read it, and what its transforms cost.

    `turn` is the cost of the transform, `back` that of its inverse; None where it cannot be.
    """

    made: int
    readers: tuple[int, ...]
    turn: int | None
    back: int | None

    def cost(self, turned: Collection[int]) -> int | None:
        """What the value costs when these parts turn; None if that cannot be."""
        other = [reader for reader in self.readers if (reader in turned) != (self.made in turned)]
        if not other:
            return 0
        return self.back if self.made in turned else self.turn


def total(forks: Iterable[Fork], turned: Collection[int]) -> int | None:
    """What all values cost when these parts turn; None if that cannot be."""
    costs = [fork.cost(turned) for fork in forks]
    return None if None in costs else sum(cast("list[int]", costs))


def cheapest(
    forks: Sequence[Fork], turned: Collection[int], plain: Collection[int]
) -> frozenset[int] | None:
    """The smallest of the cheapest sets of parts that hold all of `turned` and none of `plain`.

    None where there is no such set. The smallest is unique, whatever the order of things.
    """
    # torch imports it when it is needed, and so do we
    import networkx as nx

    if not turned:
        return frozenset()
    graph = nx.DiGraph()
    source, sink = "plain", "turned"
    graph.add_nodes_from((source, sink))
    for part in plain:
        graph.add_edge(source, part)
    for part in turned:
        graph.add_edge(part, sink)
    for number, fork in enumerate(forks):
        turn, back = ("turn", number), ("back", number)
        _add(graph, fork.made, turn, fork.turn)
        _add(graph, back, fork.made, fork.back)
        for reader in fork.readers:
            graph.add_edge(turn, reader)
            graph.add_edge(reader, back)
    try:
        # edges without a capacity have no limit
        _, (_, side) = nx.minimum_cut(graph, source, sink)
    except nx.NetworkXUnbounded:
        return None
    return frozenset(part for part in side if isinstance(part, int))


def _add(graph: nx.DiGraph[object], start: object, end: object, cost: int | None) -> None:
    """An edge of that capacity; without one, of no limit."""
    limits = {} if cost is None else {"capacity": cost}
    graph.add_edge(start, end, **limits)
