"""Plans: equal choices are equal plans, text round-trips, and bad text is refused."""

import itertools
import json

import pytest

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.plan import Declined, Online, Plan, Quantized, Recipe, Role, Rotated
from qpass.rotations import Transform

RECIPE = Recipe.read("w4a8")
ROTATED = (
    Rotated("embed.weight@1", Transform("hadamard", 48, seed=3)),
    Rotated("layers.0.v.weight@0", Transform("hadamard", 16, heads=2, lifted=True)),
)
ONLINE = (Online("layers.0.down.weight", Transform("hadamard", 96)),)
QUANTIZED = (
    Quantized("layers.0.down.weight", Role.LINEAR, RECIPE.weight, RECIPE.activation, "nearest"),
    Quantized("head.weight", Role.HEAD, QuantSpec("int8"), None, "nearest"),
)
DECLINED = (Declined("layers.0.norm.weight", "is not a matrix"), Declined("layers.0", "a \u2260 b"))
PLAN = Plan(RECIPE, ROTATED, ONLINE, QUANTIZED, DECLINED)


def test_json_round_trip():
    assert Plan.read(PLAN.json()) == PLAN
    assert Plan.read(PLAN.json()).json() == PLAN.json()
    assert Plan.read(json.dumps(json.loads(PLAN.json()))) == PLAN


def test_equal_choices_are_equal_plans_whatever_the_order():
    for rotated, quantized in itertools.product(
        itertools.permutations(ROTATED), itertools.permutations(QUANTIZED)
    ):
        plan = Plan(RECIPE, rotated, ONLINE, quantized, DECLINED[::-1])
        assert plan == PLAN
        assert hash(plan) == hash(PLAN)
        assert plan.digest() == PLAN.digest()
        assert plan.json() == PLAN.json()


def test_any_change_changes_the_digest():
    others = (
        Plan(Recipe.read("w4a8", seed=1), ROTATED, ONLINE, QUANTIZED, DECLINED),
        Plan(RECIPE, ROTATED[:1], ONLINE, QUANTIZED, DECLINED),
        Plan(RECIPE, ROTATED, (), QUANTIZED, DECLINED),
        Plan(RECIPE, ROTATED, ONLINE, QUANTIZED[:1], DECLINED),
        Plan(RECIPE, ROTATED, ONLINE, QUANTIZED, ()),
    )
    assert len({PLAN.digest(), *(other.digest() for other in others)}) == 1 + len(others)


def test_one_choice_a_name():
    with pytest.raises(BadInput, match=r"embed\.weight@1' is given twice"):
        Plan(RECIPE, (*ROTATED, Rotated("embed.weight@1", Transform("haar", 48))))


def changed(path: tuple[str | int, ...], value: object) -> str:
    data = json.loads(PLAN.json())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[]", "version"),
        ("{}", "version"),
        (changed(("version",), 2), "newer"),
        (changed(("version",), 0), "version = 0"),
        (changed(("version",), "1"), "version"),
        (changed(("extra",), 1), "a table of"),
        (changed(("recipe",), "w4a8"), "recipe"),
        (changed(("recipe", "rotation"), "up"), "rotation = 'up'"),
        (changed(("recipe", "colour"), "red"), "colour"),
        (changed(("rotated",), {}), "a list"),
        (changed(("rotated", 0), {"region": "a"}), "a table of region, transform"),
        (changed(("rotated", 0, "region"), 1), "region = 1"),
        (changed(("rotated", 0, "transform", "rotation"), "hadamar"), "hadamard"),
        (changed(("rotated", 0, "transform", "width"), 0), "width = 0"),
        (changed(("rotated", 0, "transform", "seed"), True), "seed = True"),
        (changed(("online", 0, "transform", "lifted"), 0), "lifted = 0"),
        (changed(("quantized", 0, "role"), "tail"), "role = 'tail'"),
        (changed(("quantized", 0, "rounding"), "nearst"), "nearest"),
        (changed(("quantized", 0, "weight"), None), "weight = None"),
        (changed(("quantized", 0, "weight", "block"), 0), "block = 0"),
        (changed(("declined", 0, "why"), None), "why = None"),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str, why: str):
    with pytest.raises(BadInput, match="plan: ") as caught:
        Plan.read(text)
    assert why in str(caught.value)
