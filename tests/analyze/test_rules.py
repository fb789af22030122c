"""Does every operator do to a basis what its rule claims, and would a wrong rule be seen?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from qpass.analyze.atoms import fresh, size_of
from qpass.analyze.constraints import Constraints, Layout
from qpass.analyze.rules import base
from qpass.analyze.rules.base import ruled_operators
from qpass.ir import read
from tests.analyze.claims import try_claims, try_refusals
from tests.analyze.draws import DRAWS

aten = torch.ops.aten


@pytest.mark.parametrize("target", ruled_operators(), ids=str)
def test_every_rule_is_drawn(target: object) -> None:
    assert target in DRAWS, f"{target} has a rule and no draw in tests/analyze/draws.py"


@pytest.mark.parametrize("target", ruled_operators(), ids=str)
def test_a_rule_claims_nothing_false(target: object) -> None:
    try_claims(target)


@pytest.mark.parametrize("target", ruled_operators(), ids=str)
def test_a_rule_refuses_nothing_true(target: object) -> None:
    try_refusals(target)


def give_untied(c: Constraints, node: fx.Node, layout: Layout) -> None:
    """Forget what the axes of a result are tied to."""
    c.layouts[node] = tuple(fresh(size_of(size)) for size in read.shape(node))


def give_pinned(c: Constraints, node: fx.Node, layout: Layout) -> None:
    """Pin whatever an operator touches."""
    c.layouts[node] = tuple(layout)
    for i, touched in enumerate((node, *node.all_input_nodes)):
        for dim, axis in enumerate(c.layout(touched)):
            c.pin(axis, f"axis {dim} of value {i}")


def tie_alike(c: Constraints, left: Layout, right: Layout, *, power: int = 1) -> None:
    """Forget that axes are dual."""
    TIE(c, left, right)


TIE = Constraints.tie

# a method that rules call, what it does in its place, and what sees it
PLANTED: dict[str, tuple[str, Callable[..., object], Callable[[object], None]]] = {
    "pins nothing": ("pin", lambda *_: None, try_claims),
    "limits nothing": ("limit", lambda *_: None, try_claims),
    "ties nothing": ("tie", lambda *_, **__: None, try_claims),
    "ties duals as equals": ("tie", tie_alike, try_claims),
    "gives a result that is tied to nothing": ("give", give_untied, try_claims),
    "pins all that it touches": ("give", give_pinned, try_refusals),
}

# what an index repeats is seen in a graph only; random graphs show wrong rules of these
IN_GRAPHS = {"gathers"}
FAMILIES = sorted({base._RULES[t].__module__.rpartition(".")[2] for t in base._RULES} - IN_GRAPHS)
# the families in which nothing is contracted, and so nothing is tied dually
UNCONTRACTED = ("along", "elementwise", "masks", "norms", "structure", "views")


def family(name: str) -> list[object]:
    found = [t for t in ruled_operators() if base.find_rule(t).__module__.endswith(f".{name}")]
    assert found
    return found


def seen(check: Callable[[object], None], target: object) -> bool:
    try:
        check(target)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_rule_of_a_family_is_seen(name: str, bug: str, monkeypatch) -> None:
    if bug == "ties duals as equals" and name in UNCONTRACTED:
        pytest.skip("nothing is tied dually")
    method, wrong, check = PLANTED[bug]
    targets = family(name)
    monkeypatch.setattr(Constraints, method, wrong)
    assert any(seen(check, target) for target in targets)


@pytest.mark.parametrize(
    "power", [aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.reciprocal.default]
)
def test_a_forgotten_power_is_seen(power: object, monkeypatch) -> None:
    try_claims(power)
    monkeypatch.setattr("qpass.analyze.rules.elementwise.raised", lambda axis, _: axis)
    assert seen(try_claims, power)
