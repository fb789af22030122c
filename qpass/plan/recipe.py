"""What a user may ask for: formats, rotations, and how the ends of the model are stored."""

from __future__ import annotations

import dataclasses
import enum
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

from qpass.errors import BadInput, expect, expect_type
from qpass.formats import QuantSpec
from qpass.plan.capability import Capability, preset_for
from qpass.ranges import RANGES
from qpass.registry import unknown
from qpass.rotations import ROTATIONS
from qpass.rounding import ROUNDINGS

AUTO = "auto"
BASE = "recipe"
CUSTOM = "custom"
# a recipe that asks for no device in particular
ANY = "any"
FLOAT = "float"
# transforms that need no data: those that the recipe names
FIXED = "fixed"
# rounded weights that stay as they are
OFF = "off"
PRESETS = Path(__file__).parent / "presets"
# fields that came later, with what they were before
LATER = {
    "transform": FIXED,
    "weigh_tokens": True,
    "refine": OFF,
    "ranges": AUTO,
    "select": 0,
    "device": ANY,
}
# the rounding of weights whose inputs are known
CALIBRATED = "gptq-descent"
PORTABLE = Capability()
# how a head or an embedding table is stored when not float: one scale for each row
INT8_ROWS = QuantSpec("int8", "channel")


class Role(enum.Enum):
    """What a quantized weight is to the model."""

    LINEAR = "linear"
    HEAD = "head"
    EMBEDDING = "embedding"


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """The wishes that a plan is made from; `None` for a spec leaves those values float.

    `residual`, `value` and `online` name the rotations of the residual stream, of what each head
    passes from values to outputs, and of edges where a rotation has to run with the model.
    `rotation` "auto" decides for each of them by error. `transform` says what finds better ones
    from data, once those are chosen: one method, or several in order, joined by "+". `rounding`
    "auto" is the best one that the data at hand allows. `refine` says what changes rounded weights
    further, named as `transform` is. `ranges` says where grids of activations end, from data:
    "auto" takes the least cost for static ones, and for dynamic ones of few bits where there is
    data. `weigh_tokens` counts each token of the data by how far the outputs move with it, for
    which the whole model runs backward once. `select` calibrates on so many of the batches, those
    that stand best for all (0: on all). `keep_tied` leaves a weight that is used twice as one.
    `device` "cuda" insists on a GPU that kernels serve; without one the recipe is refused.
    """

    name: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    rotation: str = "on"
    residual: str = "hadamard"
    value: str = "hadamard"
    online: str = "hadamard"
    transform: str = FIXED
    rounding: str = AUTO
    refine: str = OFF
    ranges: str = AUTO
    weigh_tokens: bool = True
    select: int = 0
    head: str = "int8"
    embedding: str = "int8"
    keep_tied: bool = False
    seed: int = 0
    device: str = ANY

    @staticmethod
    def read(
        what: str | Path | Mapping[str, object] | Recipe,
        *,
        capability: Capability = PORTABLE,
        **changes: object,
    ) -> Recipe:
        """The recipe that `what` names, holds or is, with some of its fields changed.

        A string is a preset's name or the path of a TOML file. A table holds fields; its key
        `recipe` says which other recipe they change (in a file: a preset), and without it absent
        fields have their defaults. `capability` decides what the preset "auto" is.
        """
        given: object = what
        if isinstance(given, Recipe):
            recipe = given
        elif isinstance(given, Mapping):
            recipe = _from_table(given, CUSTOM, capability)
        elif isinstance(given, Path):
            recipe = _from_file(given, capability)
        else:
            expect_type(str, "recipe", given, "a name, a path, a table or a Recipe")
            recipe = _named(str(given), capability)
        return _changed(recipe, changes) if changes else recipe

    def __post_init__(self) -> None:
        expect_type(str, "name", self.name, "a printable string")
        expect(self.name.isprintable() and self.name != "", "name", self.name, "a printable string")
        _one_of("rotation", self.rotation, ("on", "off", "auto"))
        _one_of("head", self.head, ("int8", FLOAT))
        _one_of("embedding", self.embedding, ("int8", FLOAT))
        _one_of("device", self.device, (ANY, "cuda"))
        expect_type(bool, "weigh_tokens", self.weigh_tokens, "true or false")
        expect_type(int, "select", self.select, "how many batches, or 0 for all")
        expect(self.select >= 0, "select", self.select, "how many batches, or 0 for all")
        expect_type(bool, "keep_tied", self.keep_tied, "true or false")
        expect_type(int, "seed", self.seed, "an integer from 0")
        expect(self.seed >= 0, "seed", self.seed, "an integer from 0")
        rotations = (("residual", self.residual), ("value", self.value), ("online", self.online))
        for key, rotation in rotations:
            expect_type(str, key, rotation, "the name of a rotation")
            ROTATIONS[rotation]
        expect_type(str, "transform", self.transform, "the name of a method")
        for method in self.methods:
            # what the methods take holds recipes
            from qpass.plan.chooser import CHOOSERS

            CHOOSERS[method]
        expect_type(str, "rounding", self.rounding, "the name of a rounding")
        if self.rounding != AUTO:
            ROUNDINGS[self.rounding]
        expect_type(str, "refine", self.refine, "the name of a method")
        for method in self.refinements:
            from qpass.plan.refiner import REFINERS

            REFINERS[method]
        self._check_specs()
        expect_type(str, "ranges", self.ranges, "the name of a range")
        if self.ranges != AUTO:
            found, rows = RANGES[self.ranges], self.activation
            why = '"auto": activations stay float'
            expect(rows is not None, "ranges", self.ranges, why)
            why = '"auto", or a static activation: it says nothing of dynamic scales'
            expect(found.dynamic or (rows and rows.static) is True, "ranges", self.ranges, why)

    def _check_specs(self) -> None:
        for key, spec in (("weight", self.weight), ("activation", self.activation)):
            if spec is not None:
                expect_type(QuantSpec, key, spec, "a quantization spec, or None for float")
        if self.weight is not None:
            expect(not self.weight.dynamic, "weight.dynamic", True, "false: weights are stored")
            why = "nothing: scales of weights follow from these"
            expect(self.weight.scale is None, "weight.scale", self.weight.scale, why)
        if (spec := self.activation) is None:
            return
        expect(self.weight is not None, "weight", FLOAT, "a table: activations are quantized")
        expect(spec.axis == -1, "activation.axis", spec.axis, "-1")
        if spec.dynamic:
            allowed = '"channel" (per token) or a positive integer; with dynamic = false "tensor"'
            expect(spec.block != "tensor", "activation.block", spec.block, allowed)
        else:
            allowed = 'true: one static scale is that of all values, block = "tensor"'
            expect(spec.block == "tensor", "activation.dynamic", False, allowed)
            allowed = '"float32": one scale takes no room'
            expect(spec.scale_format == "float32", "scale_format", spec.scale_format, allowed)

    @property
    def methods(self) -> tuple[str, ...]:
        """What finds transforms from data, in order; nothing for fixed ones."""
        return () if self.transform == FIXED else tuple(self.transform.split("+"))

    @property
    def refinements(self) -> tuple[str, ...]:
        """What changes rounded weights further, in order."""
        return () if self.refine == OFF else tuple(self.refine.split("+"))

    def settled(self, *, calibrated: bool) -> Recipe:
        """The recipe with its rounding chosen, for a run with calibration data or without."""
        if self.rounding != AUTO:
            return self
        return dataclasses.replace(self, rounding=CALIBRATED if calibrated else "nearest")

    def spec(self, role: Role) -> QuantSpec | None:
        """How weights of `role` are stored; None keeps them float."""
        if role is Role.LINEAR:
            return self.weight
        kept = self.head if role is Role.HEAD else self.embedding
        return None if kept == FLOAT else INT8_ROWS

    def table(self) -> dict[str, object]:
        """The fields by name, as recipe files hold them."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for key, spec in (("weight", self.weight), ("activation", self.activation)):
            fields[key] = FLOAT if spec is None else spec.table()
        # written as they were before there was a choice
        return {k: v for k, v in fields.items() if k not in LATER or v != LATER[k]}

    def toml(self) -> str:
        """A recipe file that reads back as this recipe."""
        plain: list[str] = []
        tables: list[str] = []
        for key, value in self.table().items():
            if isinstance(value, Mapping):
                lines = [f"{name} = {_literal(field)}" for name, field in value.items()]
                tables += ["", f"[{key}]", *lines]
            else:
                plain.append(f"{key} = {_literal(value)}")
        return "\n".join([*plain, *tables]) + "\n"


def preset_names() -> list[str]:
    """Every name that `Recipe.read` knows."""
    return sorted([AUTO, *(path.stem for path in PRESETS.glob("*.toml"))])


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    expect(value in allowed, key, value, " or ".join(f'"{name}"' for name in allowed))


def _literal(value: object) -> str:
    # TOML shares JSON's spelling of printable strings, integers and booleans
    return json.dumps(value, ensure_ascii=False)


def _named(text: str, capability: Capability) -> Recipe:
    if text in preset_names():
        return _preset(text, capability)
    if text.endswith(".toml") or "/" in text:
        return _from_file(Path(text), capability)
    raise unknown("recipe", text, preset_names())


def _preset(name: str, capability: Capability) -> Recipe:
    if name != AUTO:
        return _from_file(PRESETS / f"{name}.toml", capability)
    chosen = _preset(preset_for(capability), capability)
    return dataclasses.replace(chosen, name=AUTO, rotation="auto")


def _from_file(path: Path, capability: Capability) -> Recipe:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"recipe {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {path}: is not TOML ({error})") from error
    # a file that starts from another file could start from itself
    if BASE in table and table[BASE] not in preset_names():
        raise unknown(f"preset for the key {BASE!r}", str(table[BASE]), preset_names())
    try:
        return _from_table(table, path.stem, capability)
    except BadInput as error:
        raise BadInput(f"recipe {path}: {error}") from error


def _from_table(table: Mapping[str, object], name: str, capability: Capability) -> Recipe:
    fields = dict(table)
    if BASE not in fields:
        return _changed(Recipe(name), fields)
    base = cast("str | Path | Mapping[str, object] | Recipe", fields.pop(BASE))
    return _changed(Recipe.read(base, capability=capability), fields)


def _changed(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in changes:
        if key not in known:
            raise unknown("recipe key", str(key), [*known, BASE])
    fields: dict[str, Any] = dict(changes)
    for key, old in (("weight", recipe.weight), ("activation", recipe.activation)):
        if key in changes:
            fields[key] = _spec(key, changes[key], old)
    return dataclasses.replace(recipe, **fields)


def _spec(key: str, given: object, old: QuantSpec | None) -> QuantSpec | None:
    if given is None or given == FLOAT:
        return None
    if isinstance(given, QuantSpec):
        return given
    expect(isinstance(given, Mapping), key, given, f'a table or "{FLOAT}"')
    try:
        return QuantSpec.read(cast("Mapping[str, object]", given), old)
    except BadInput as error:
        raise BadInput(f"{key}.{error}") from error
