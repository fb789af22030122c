"""Is what the analysis calls free really free, in models that nobody wrote by hand?"""

from __future__ import annotations

import functools
import random

import pytest
import torch
from torch import Tensor, fx

from qpass.analyze import find_regions
from qpass.analyze.constraints import Constraints
from qpass.analyze.rules import base
from qpass.analyze.rules.broadcast import merge
from qpass.capture.export import capture
from qpass.ir import Program, read, run_passes
from qpass.plan import Recipe
from qpass.plan.choose import choose
from qpass.rotations import Group
from qpass.transform import FoldNorms, InsertOnline, RotateRegions
from tests.analyze.blocks import BLOCKS, net, tokens
from tests.analyze.regions import changes_output, differs, fits

aten = torch.ops.aten

# groups that say something else while norms have their gains
WITH_GAINS = (Group.DIAGONAL, Group.PERMUTATION, Group.ORTHOGONAL)


@functools.cache
def programs(names: tuple[str, ...], seed: int) -> tuple[Program, tuple[object, ...], Tensor]:
    """A model as captured, its flat inputs and its output."""
    inputs = {"tokens": tokens(seed)}
    captured = capture(net(names, seed), inputs)
    flat = captured.flatten(inputs)
    (want,) = captured.program.run(*flat, widen=True)
    assert isinstance(want, Tensor)
    return captured.program, flat, want


def unsound(names: tuple[str, ...], seed: int, groups: tuple[Group, ...] = tuple(Group)) -> str:
    """Which regions are called free and are not, or nothing."""
    captured, flat, want = programs(names, seed)
    folded, _ = run_passes(captured, [FoldNorms()])
    tried = [(folded, group) for group in groups]
    tried += [(captured, group) for group in groups if group in WITH_GAINS]
    for program, group in tried:
        regions = [r for r in find_regions(program, group) if r.free and fits(r, group)]
        if changes_output(program, regions, flat, want):
            return f"{group}: one of {[region.name for region in regions]}"
    return ""


def mixtures(count: int) -> list[tuple[str, ...]]:
    """Models of four blocks in which every block occurs `count` times."""
    order = random.Random(0)
    names = [name for _ in range(count) for name in order.sample(sorted(BLOCKS), len(BLOCKS))]
    return [tuple(names[i : i + 4]) for i in range(0, len(names), 4)]


MODELS = list(enumerate(mixtures(2)))


@pytest.mark.parametrize(("seed", "names"), MODELS, ids=str)
def test_free_regions_are_free(seed: int, names: tuple[str, ...]) -> None:
    assert unsound(names, seed) == ""


@pytest.mark.parametrize(("seed", "names"), MODELS, ids=str)
def test_exact_passes_are_exact(seed: int, names: tuple[str, ...]) -> None:
    program, flat, want = programs(names, seed)
    program, _ = run_passes(program, [FoldNorms()])
    plan = choose(program, Recipe("rotated", rotation="on", residual="haar", value="haar"))
    for step in (RotateRegions(plan.rotated), InsertOnline(plan.online)):
        assert not differs(program.run(*flat, widen=True)[0], want)
        program, notes = run_passes(program, [step])
        assert all(note.done for note in notes)
    assert not differs(program.run(*flat, widen=True)[0], want)


def through(name: str) -> base.Rule:
    """The wrong rule that a result changes like its argument `name`."""
    return lambda node, c: c.give(node, c.layout(read.value(node, name)))


def without_bias(node: fx.Node, c: Constraints) -> None:
    """The wrong rule for a linear layer, which forgets its bias."""
    matrix = c.layout(read.value(node, "weight"))
    values = c.layout(read.value(node, "input"))
    c.contract(values, -1, matrix, -1)
    c.give(node, (*values[:-1], matrix[0]))


def overlooked(node: fx.Node, c: Constraints) -> None:
    """The wrong rule for a product, which forgets that its other factor may change, too."""
    left, right = read.value(node, "self"), read.optional_value(node, "other")
    axes = c.layout(left)
    c.give(node, axes if right is None else merge(c, axes, c.layout(right)[:0], constant=None))


# the operators that get a wrong rule, the rule, a group that shows it, and blocks with the operator
PLANTED = {
    "a tie through relu": (
        (aten.relu.default, aten.gelu.default),
        through("self"),
        Group.ORTHOGONAL,
        ("Plain", "Gated"),
    ),
    "an ignored gain": (
        (aten.rms_norm.default, aten.layer_norm.default),
        through("input"),
        Group.PERMUTATION,
        ("Attention", "Plain"),
    ),
    "a square as it was": (
        (aten.pow.Tensor_Scalar, aten.square.default),
        through("self"),
        Group.POSITIVE_DIAGONAL,
        ("Plain", "Gated"),
    ),
    "a factor that is overlooked": (
        (aten.mul.Tensor,),
        overlooked,
        Group.DIAGONAL,
        ("Gated", "Plain"),
    ),
    "a forgotten bias": (
        (aten.linear.default,),
        without_bias,
        Group.ORTHOGONAL,
        ("Attention", "Plain"),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_wrong_rule_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, wrong, group, names = PLANTED[bug]
    for target in targets:
        assert base.find_rule(target) is not None
        monkeypatch.setitem(base._RULES, target, wrong)
    assert any(unsound(names, seed, (group,)) for seed in range(12))


def test_a_mixture_of_heads_that_nobody_notes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Constraints, "mix", lambda *_: None)
    assert any(unsound(("MixedHeads",), seed, (Group.ORTHOGONAL,)) for seed in range(3))
