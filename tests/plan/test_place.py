"""Is the minimum cut the cheapest of all ways to turn parts, and the smallest of the cheapest?"""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.plan.place import Fork, cheapest, total

PARTS = 6


@st.composite
def networks(draw) -> tuple[list[Fork], frozenset[int], frozenset[int]]:
    """Random DAGs of parts: a value is read by parts behind its maker, or by the maker itself."""
    forks: list[Fork] = []
    cost = st.one_of(st.integers(0, 4), st.none())
    for _ in range(draw(st.integers(1, 8))):
        made = draw(st.integers(0, PARTS - 1))
        readers = draw(st.sets(st.integers(made, PARTS - 1), min_size=1, max_size=4))
        forks.append(Fork(made, tuple(sorted(readers)), draw(cost), draw(cost)))
    fate = [draw(st.sampled_from(("turned", "plain", "free"))) for _ in range(PARTS)]
    turned = frozenset(i for i, f in enumerate(fate) if f == "turned")
    plain = frozenset(i for i, f in enumerate(fate) if f == "plain")
    return forks, turned, plain


@settings(max_examples=400, deadline=None)
@given(networks())
def test_no_choice_costs_less_and_none_as_cheap_is_smaller(network) -> None:
    forks, turned, plain = network
    free = [part for part in range(PARTS) if part not in turned | plain]
    choices = [
        turned | frozenset(more)
        for count in range(len(free) + 1)
        for more in itertools.combinations(free, count)
    ]
    costs = {choice: cost for choice in choices if (cost := total(forks, choice)) is not None}
    found = cheapest(forks, turned, plain)
    if not costs:
        assert found is None
        return
    assert found is not None
    least = min(costs.values())
    assert costs[found] == least
    assert all(found <= choice for choice, cost in costs.items() if cost == least)


def test_a_price_that_is_too_high_is_not_paid() -> None:
    # one value that two products read: turned once, unless that costs more than to turn its maker
    forks = [Fork(0, (1, 2), 3, 3), Fork(3, (0,), 2, 2)]
    assert cheapest(forks, {1, 2}, {3}) == {0, 1, 2}
    assert cheapest(forks, {1, 2}, {0, 3}) == {1, 2}
    assert cheapest(forks, {1}, {1}) is None
    assert cheapest(forks, set(), {1}) == frozenset()
