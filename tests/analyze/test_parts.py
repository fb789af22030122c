"""Do parts turn apart, in models that nobody wrote by hand: any set of them that nothing holds?"""

from __future__ import annotations

import random

import pytest

from qpass.analyze import rotatable_regions
from qpass.analyze.parts import find_parts
from qpass.ir import Program, run_passes
from qpass.plan import Paired, Recipe
from qpass.plan.choose import choose
from qpass.report.coverage import find_coverage, online_widths
from qpass.rotations import Group, Transform
from qpass.transform import FoldNorms, InsertPairs, rewrite
from tests.analyze.test_soundness import MODELS, differs, programs

RECIPE = Recipe("pairs")
GROUPS = (Group.ORTHOGONAL, Group.ORTHOGONAL_ONES)


def some_parts(program: Program, group: Group, seed: int) -> list[Paired]:
    """A random set of the parts of each region that nothing holds."""
    choice, found = random.Random(seed), list[Paired]()
    regions = [r for r in rotatable_regions(program) if r.pins]
    for parts in find_parts(program, regions, group):
        free = [p for p in parts.parts if p.names and not p.pins and choice.random() < 0.5]
        lifted = group is Group.ORTHOGONAL_ONES
        transform = Transform("hadamard", parts.region.width, seed, lifted=lifted)
        if names := tuple(name for part in free for name in part.names):
            found.append(Paired(parts.region.name, transform, names, "chance"))
    return found


@pytest.mark.parametrize(("seed", "names"), MODELS, ids=str)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_whatever_parts_turn_nothing_changes(
    group: Group, seed: int, names: tuple[str, ...]
) -> None:
    captured, flat, want = programs(names, seed)
    program, _ = run_passes(captured, [FoldNorms()])
    choices = some_parts(program, group, seed)
    assert choices
    after, notes = run_passes(program, [InsertPairs(tuple(choices))])
    assert all(note.done for note in notes)
    assert not differs(after.run(*flat, widen=True)[0], want)


@pytest.mark.parametrize(("seed", "names"), MODELS, ids=str)
def test_pairs_never_cost_more_than_products_alone(seed: int, names: tuple[str, ...]) -> None:
    captured, flat, want = programs(names, seed)
    program, _ = run_passes(captured, [FoldNorms()])
    plain, paired = (choose(program, RECIPE, pairs=pairs) for pairs in (False, True))
    one, other = (rewrite(program, plan).program for plan in (plain, paired))
    assert len(online_widths(other)) <= len(online_widths(one))
    declined = [find_coverage(program).declined for program in (one, other)]
    # products that no transform can stand in front of are reached where that costs nothing
    assert declined[1] <= declined[0] + 1e-12
    fewer = len(online_widths(other)) < len(online_widths(one))
    assert bool(paired.paired) is (fewer or declined[1] < declined[0] - 1e-12)
    assert not differs(other.run(*flat, widen=True)[0], want)
