"""Recipes: presets, files, tables, changes, and what is wrong with the wrong ones."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from qpass.errors import BadInput, UnknownName
from qpass.formats import QuantSpec
from qpass.plan import Capability, Recipe, Role, preset_names

EACH = pytest.mark.parametrize("name", preset_names())


@EACH
def test_toml_round_trip(name: str, tmp_path: Path):
    recipe = dataclasses.replace(Recipe.read(name), seed=7, keep_tied=True, head="float")
    path = tmp_path / "other.toml"
    path.write_text(recipe.toml())
    assert Recipe.read(path) == Recipe.read(str(path)) == recipe
    assert recipe.name == name


@EACH
def test_table_and_instance_round_trip(name: str):
    recipe = Recipe.read(name)
    assert Recipe.read(recipe.table()) == recipe
    assert Recipe.read(recipe) is recipe
    assert Recipe.read({"recipe": name}) == recipe


def test_presets_are_what_their_names_say():
    floats = {"mxfp4", "nvfp4"}
    integers = set(preset_names()) - floats - {"auto"}
    assert integers >= {"w8a8", "w8a16", "w4a16-g64", "w4a8", "w4a4", "w3a16-g64", "w2a16-g64"}
    for name in integers:
        recipe = Recipe.read(name)
        assert recipe.weight is not None
        assert name.startswith(f"w{recipe.weight.codes.bits}a")
        activation = 16 if recipe.activation is None else recipe.activation.codes.bits
        assert f"a{activation}" in name
        block = f"-g{recipe.weight.block}" in name
        assert block is ("-g" in name)
        if block:
            assert name.endswith("-asym") is not recipe.weight.symmetric
        # weights that may lie on the grid already are rotated only where that is better
        rotated = "on" if recipe.weight.symmetric else "auto"
        assert recipe.rotation == ("off" if recipe.activation is None else rotated)
    assert Recipe.read("w4a8").weight == QuantSpec(
        "int4", 32, scale_format="float16", symmetric=False
    )
    mx = QuantSpec("e2m1", 32, scale_format="e8m0")
    nv = QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True)
    for name, spec in (("mxfp4", mx), ("nvfp4", nv)):
        assert Recipe.read(name).weight == spec
        assert Recipe.read(name).activation == dataclasses.replace(spec, dynamic=True)


def test_auto_is_a_function_of_the_capability():
    for dot, nibbles in itertools.product([False, True], repeat=2):
        recipe = Recipe.read("auto", capability=Capability(dot, nibbles))
        base = "w8a16" if not dot else "w4a8" if nibbles else "w8a8"
        assert recipe == dataclasses.replace(Recipe.read(base), name="auto", rotation="auto")


def test_changes_and_bases():
    recipe = Recipe.read({"recipe": "w4a8", "weight": {"block": 64}}, seed=3, activation="float")
    assert recipe.weight == QuantSpec("int4", 64, scale_format="float16", symmetric=False)
    assert recipe.activation is None
    assert recipe.seed == 3
    assert Recipe.read("w8a8", weight=QuantSpec("int4")).weight == QuantSpec("int4")
    assert Recipe.read("w8a16", activation={"format": "int8", "dynamic": True}).activation


def test_a_file_may_start_from_a_preset_and_is_named_after_itself(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "w4a8"\nseed = 4\n')
    assert Recipe.read(path) == Recipe.read("w4a8", seed=4)
    path.write_text('[weight]\nformat = "int8"\n')
    assert Recipe.read(path) == Recipe("mine", QuantSpec("int8"))
    path.write_text('recipe = "mine.toml"\n')
    with pytest.raises(UnknownName, match="preset"):
        Recipe.read(path)


@pytest.mark.parametrize(
    ("what", "near"),
    [
        ("w4a9", "w4a8"),
        ({"recipe": "w4a8", "weigth": {}}, "weight"),
        ({"rotaton": "on"}, "rotation"),
        ({"weight": {"format": "int4", "blok": 3}}, "block"),
        ({"weight": {"format": "imt4"}}, "int4"),
        ({"residual": "hadamrd"}, "hadamard"),
        ({"rounding": "neerest"}, "nearest"),
    ],
    ids=str,
)
def test_unknown_names_come_with_the_nearest(what: str | dict[str, object], near: str):
    with pytest.raises(UnknownName, match=f"did you mean '{near}'"):
        Recipe.read(what)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"rotation": "maybe"}, "rotation"),
        ({"rotation": True}, "rotation"),
        ({"rotation": ["on"]}, "rotation"),
        ({"head": "int4"}, "head"),
        ({"embedding": None}, "embedding"),
        ({"keep_tied": 1}, "keep_tied"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "0"}, "seed"),
        ({"residual": 3}, "residual"),
        ({"rounding": None}, "rounding"),
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"weight": "int4"}, "weight"),
        ({"weight": {"block": "row"}}, "weight.block"),
        ({"weight": {"dynamic": True}}, "weight.dynamic"),
        ({"activation": {"dynamic": False}}, "activation.dynamic"),
        ({"activation": {"block": "tensor"}}, "activation.block"),
        ({"activation": {"axis": 0}}, "activation.axis"),
        ({"activation": {"scale_format": "float8"}}, "activation.scale_format"),
        ({"activation": {"tensor_scale": True}}, "activation.tensor_scale"),
        ({"activation": {"block": 16, "scale_format": "e4m3"}}, "activation.tensor_scale"),
        ({"weight": {"format": "e2m1", "symmetric": False}}, "weight.symmetric"),
        ({"weight": {"scale_format": "e8m0", "symmetric": False}}, "weight.symmetric"),
        ({"weight": "float"}, "weight"),
    ],
    ids=str,
)
def test_wrong_values_say_key_value_and_what_is_allowed(change: dict[str, object], key: str):
    with pytest.raises(BadInput) as caught:
        Recipe.read({"recipe": "w8a8"} | change)
    assert str(caught.value).startswith(f"{key} = ")
    assert "expected" in str(caught.value)


def test_files_that_are_not_recipes(tmp_path: Path):
    with pytest.raises(BadInput, match="cannot be read"):
        Recipe.read(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="cannot be read"):
        Recipe.read("none.toml")
    with pytest.raises(BadInput, match="cannot be read"):
        Recipe.read(tmp_path)
    path = tmp_path / "bad.toml"
    path.write_text("rotation = \n")
    with pytest.raises(BadInput, match="not TOML"):
        Recipe.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not TOML"):
        Recipe.read(path)
    path.write_text("seed = 1.5\n")
    with pytest.raises(BadInput, match=r"bad\.toml: seed = 1.5"):
        Recipe.read(path)
    with pytest.raises(BadInput, match="a name, a path, a table or a Recipe"):
        Recipe.read(3)


def test_storage_of_each_role():
    recipe = Recipe.read("w4a8", head="float")
    assert recipe.spec(Role.LINEAR) == recipe.weight
    assert recipe.spec(Role.HEAD) is None
    assert recipe.spec(Role.EMBEDDING) == QuantSpec("int8", "channel")
