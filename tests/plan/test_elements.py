"""Plans with numbers: saved beside the plan, found with it, and refused when they are not its."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpass.errors import BadInput
from qpass.plan import Changed, Online, Paired, Plan, Recipe, Rotated
from qpass.plan.numbers import numbers_path
from qpass.rotations import Element, Group, Key, Transform, sample

TURN = Element.of("orthogonal", sample(Group.ORTHOGONAL, 8, Key("turn", 0)))
SCALE = Element.of("diagonal", torch.tensor([0.5, 2.0, 1.0, 3.0]))
PLAN = Plan(
    Recipe("numbers"),
    rotated=(Rotated("a[0:8]", TURN), Rotated("b[0:8]", Transform("hadamard", 8))),
    changed=(Changed("a[0:4]", Group.DIAGONAL, SCALE),),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_and_its_numbers_come_back(saved: Path) -> None:
    found = Plan.load(saved)
    assert found == PLAN
    assert hash(found) == hash(PLAN)
    assert found.json() == PLAN.json()
    assert found.digest() == PLAN.digest()
    for element, given in zip(found.elements, PLAN.elements, strict=True):
        assert torch.equal(element.given(), given.given())


def test_equal_plans_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    Plan.load(saved).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == saved.read_bytes()
    again = numbers_path(tmp_path / "again.json").read_bytes()
    assert again == numbers_path(saved).read_bytes()


def test_other_numbers_are_another_plan() -> None:
    other = Element.of("diagonal", torch.tensor([0.5, 2.0, 1.0, 3.5]))
    changed = Plan(PLAN.recipe, PLAN.rotated, changed=(Changed("a[0:4]", Group.DIAGONAL, other),))
    assert changed != PLAN
    assert changed.digest() != PLAN.digest()


def test_missing_numbers(saved: Path) -> None:
    numbers_path(saved).unlink()
    with pytest.raises(BadInput, match=r"not beside it\n  copy plan\.json\.safetensors"):
        Plan.load(saved)


def test_damaged_numbers(saved: Path) -> None:
    numbers_path(saved).write_bytes(numbers_path(saved).read_bytes()[:-9])
    with pytest.raises(BadInput, match="damaged"):
        Plan.load(saved)


@pytest.mark.parametrize("change", ["altered", "no element"])
def test_altered_numbers(saved: Path, change: str) -> None:
    tensors = load_file(numbers_path(saved))
    numbers = tensors.pop(SCALE.digest)
    if change == "altered":
        tensors[SCALE.digest] = numbers * 1.5
    save_file(tensors, numbers_path(saved))
    with pytest.raises(BadInput, match=change):
        Plan.load(saved)


def test_what_runs_with_the_model_goes_by_name() -> None:
    with pytest.raises(BadInput, match="a transform by name"):
        Plan(PLAN.recipe, online=(Online("a", TURN),))
    with pytest.raises(BadInput, match="a transform by name"):
        Plan(PLAN.recipe, paired=(Paired("a", TURN, ("a",), "cheap"),))


def test_scales_do_not_rotate() -> None:
    with pytest.raises(BadInput, match="does not rotate"):
        Rotated("a", SCALE)


def test_plans_are_joined_with_their_changes() -> None:
    bare = Plan(PLAN.recipe)
    assert bare.joined(PLAN).changed == PLAN.changed
    assert PLAN.joined(bare).changed == PLAN.changed
