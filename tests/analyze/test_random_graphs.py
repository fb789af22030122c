"""Is everything that is called free really free, in programs that nobody wrote?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from qpass.analyze import find_regions
from qpass.analyze.atoms import fresh, size_of
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules import base
from qpass.ir import Program, read, run_passes
from qpass.rotations import Group
from qpass.transform import FoldNorms
from tests.analyze import construct_products, constructs
from tests.analyze.random_graph import CONSTRUCTS, grow
from tests.analyze.regions import LIMIT, change, fits

# each of these says what programs are built of
__all__ = ["construct_products", "constructs"]

GRAPHS = 300
MANY = 5000
TRIED = 80  # graphs in which a planted bug has to show

GROUPS = tuple(group for group in Group if group is not Group.IDENTITY)


def differs(got: object, want: Tensor) -> bool:
    assert isinstance(got, Tensor)
    # sums that cancel leave nothing but roundings, of values of about one
    scale = max(float(want.abs().max()), 1e-3) if want.numel() else 1.0
    return not bool(((got - want).abs() <= LIMIT * scale).all())


def moved(
    program: Program, inputs: list[Tensor], want: tuple[object, ...], group: Group, seed: int
) -> str:
    """The regions that are called free and of which one is not, or nothing."""
    regions = [r for r in find_regions(program, group) if r.free and fits(r, group)]
    changed = Program(program.graph, dict(program.weights), program.sources, program.owners)
    for i, region in enumerate(regions):
        change(changed, region, seed + i)
    got = changed.run(*inputs, widen=True)
    if any(differs(a, b) for a, b in zip(got, want, strict=True) if isinstance(b, Tensor)):
        return f"{group}: one of {[region.name for region in regions]} in\n{program.text()}"
    return ""


def unsound(choice: random.Random, *, focus: str | None = None) -> str:
    """What is wrong about one random program, or nothing."""
    grown, program = grow(choice, focus=focus)
    want = program.run(*grown.inputs, widen=True)
    for group in GROUPS:
        if why := moved(program, grown.inputs, want, group, seed=len(group.value)):
            return why
    folded, notes = run_passes(program, [FoldNorms()])
    if any(note.done for note in notes):
        got = folded.run(*grown.inputs, widen=True)
        if any(differs(a, b) for a, b in zip(got, want, strict=True) if isinstance(b, Tensor)):
            return f"folded norms move the outputs of\n{program.text()}"
        for group in (Group.ORTHOGONAL, Group.ORTHOGONAL_ONES):
            if why := moved(folded, grown.inputs, want, group, seed=0):
                return why
    return ""


@settings(max_examples=GRAPHS, deadline=None, derandomize=True, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_free_in_random_graphs_is_free(seed: int) -> None:
    assert unsound(random.Random(seed)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_what_is_free_in_many_random_graphs_is_free(part: int) -> None:
    for seed in range(part * MANY // 10, (part + 1) * MANY // 10):
        assert unsound(random.Random(seed)) == "", seed


# -- wrong rules, each of which some random graph has to show

Rule = base.Rule


def without(*methods: str) -> Callable[[Rule], Rule]:
    """A rule that forgets to say something."""

    def forgetful(rule: Rule) -> Rule:
        def wrong(node: fx.Node, c: Constraints) -> None:
            with patched(c, dict.fromkeys(methods, lambda *_, **__: None)):
                rule(node, c)

        return wrong

    return forgetful


def flipped(rule: Rule) -> Rule:
    """A rule that takes a tie for a dual one, and the other way round."""

    def wrong(node: fx.Node, c: Constraints) -> None:
        def tie(left: Any, right: Any, *, power: Any = 1) -> None:
            Constraints.tie(c, left, right, power=-power)

        with patched(c, {"tie": tie}):
            rule(node, c)

    return wrong


def untied(rule: Rule) -> Rule:
    """A rule that says nothing about its result."""

    def wrong(node: fx.Node, c: Constraints) -> None:
        rule(node, c)
        if read.fake(node) is not None:
            c.give(node, [fresh(size_of(size)) for size in read.shape(node)])

    return wrong


def through(rule: Rule) -> Rule:
    """The rule that a result changes like the first argument of its shape."""

    def wrong(node: fx.Node, c: Constraints) -> None:
        for source in node.all_input_nodes:
            if source in c.layouts and read.is_floating(source) and read.same_shape(source, node):
                c.give(node, c.layout(source))
                return
        rule(node, c)

    return wrong


@contextmanager
def patched(c: Constraints, methods: dict[str, Any]) -> Iterator[None]:
    vars(c).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(c)[name]


BUGS: dict[str, Callable[[Rule], Rule]] = {
    "pins": without("pin", "limit", "pin_all"),
    "limits": without("limit"),
    "ties": without("tie"),
    "mixtures": without("mix"),
    "flipped": flipped,
    "untied": untied,
    "through": through,
}

# what a family does not say, or what could be said otherwise without harm
HARMLESS = {
    *(("along", bug) for bug in ("ties", "flipped")),
    *(("indexing", bug) for bug in ("ties", "mixtures", "flipped")),
    *(("gathers", bug) for bug in ("limits", "mixtures")),
    *(("structure", bug) for bug in ("ties", "mixtures", "flipped")),
    *(("attention", "mixtures"), ("masks", "mixtures"), ("views", "mixtures")),
    *(("convolutions", "limits"), ("norms", "limits")),
}

base.ruled_operators()
FAMILIES = sorted({rule.__module__.rpartition(".")[2] for rule in base._RULES.values()})


def test_every_family_of_rules_has_constructs() -> None:
    assert sorted(CONSTRUCTS) == FAMILIES


@pytest.mark.parametrize(
    ("family", "bug"),
    [(f, b) for f in FAMILIES for b in BUGS if (f, b) not in HARMLESS],
)
def test_a_wrong_rule_is_seen(family: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, rule in base._RULES.items():
        if rule.__module__.endswith(f".{family}"):
            monkeypatch.setitem(base._RULES, target, BUGS[bug](rule))
    assert any(unsound(random.Random(seed), focus=family) for seed in range(TRIED))
