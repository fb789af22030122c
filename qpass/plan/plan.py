"""What will be done to a model: every choice, by name, in one value that can be saved and compared.

Regions and sites are named by the analysis; a site by the path of the weight's owner.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TypeVar, cast, final

from torch import Tensor

from qpass.errors import BadInput, UnknownName, expect, expect_type
from qpass.formats import QuantSpec
from qpass.plan.numbers import load_numbers, save_numbers
from qpass.plan.recipe import Recipe, Role
from qpass.rotations import ROTATIONS, Element, Group, Kronecker, Transform
from qpass.rotations.numbers import ORTHOGONAL, PERMUTATION
from qpass.rounding import ROUNDINGS

PLAN_VERSION = 1

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Rotated:
    """A region whose values change basis; the weights around it absorb the change."""

    region: str
    transform: Transform | Element

    def __post_init__(self) -> None:
        given = self.transform
        if isinstance(given, Element) and given.kind not in (ORTHOGONAL, PERMUTATION):
            raise BadInput(
                f"{self.region}: a {given.kind} element does not rotate; give it as a change"
            )


@final
@dataclass(frozen=True, slots=True)
class Changed:
    """A region of a group other than the orthogonal ones, and the element by which it changes.

    `region` is named as the analysis for `group` does, after what is rotated has been.
    """

    region: str
    group: Group
    element: Element


@final
@dataclass(frozen=True, slots=True)
class Online:
    """A transform that runs on the input of a site, whose weight absorbs the inverse."""

    site: str
    transform: Transform | Kronecker


@final
@dataclass(frozen=True, slots=True)
class Paired:
    """A region of which a part turns; where the parts meet, a pair of transforms is put in.

    `turned` are the slices of weights that absorb `transform`, the other weights of the region stay
    as they are. They say all: which values turn follows from them at the least cost.
    """

    region: str
    transform: Transform
    turned: tuple[str, ...]
    why: str


@final
@dataclass(frozen=True, slots=True)
class Quantized:
    """How the weight of a site is stored and its input quantized."""

    site: str
    role: Role
    weight: QuantSpec
    activation: QuantSpec | None
    rounding: str

    def table(self) -> dict[str, object]:
        """The entry as JSON values."""
        activation = None if self.activation is None else self.activation.table()
        return {
            "site": self.site,
            "role": self.role.value,
            "weight": self.weight.table(),
            "activation": activation,
            "rounding": self.rounding,
        }


@final
@dataclass(frozen=True, slots=True)
class Declined:
    """A region or site that is left as it was, and why."""

    where: str
    why: str


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """The choices for one model; entries are sorted by name, so equal choices are equal plans."""

    recipe: Recipe
    rotated: tuple[Rotated, ...] = ()
    online: tuple[Online, ...] = ()
    quantized: tuple[Quantized, ...] = ()
    declined: tuple[Declined, ...] = ()
    paired: tuple[Paired, ...] = ()
    changed: tuple[Changed, ...] = ()

    def __post_init__(self) -> None:
        set_once = object.__setattr__
        for where, choice, kinds in (
            *((o.site, o.transform, (Transform, Kronecker)) for o in self.online),
            *((p.region, p.transform, (Transform,)) for p in self.paired),
        ):
            claim = isinstance(cast("object", choice), kinds)
            expect(claim, where, choice, "a transform by name, as it runs with the model")
        set_once(self, "rotated", _sorted("rotated", self.rotated, lambda r: r.region))
        set_once(self, "online", _sorted("online", self.online, lambda o: o.site))
        set_once(self, "paired", _sorted("paired", self.paired, lambda p: p.region))
        set_once(self, "changed", _sorted("changed", self.changed, _by_group))
        set_once(self, "quantized", _sorted("quantized", self.quantized, lambda q: q.site))
        set_once(self, "declined", tuple(sorted(self.declined, key=lambda d: (d.where, d.why))))

    def table(self) -> dict[str, object]:
        """The plan as JSON values."""
        return {
            "version": PLAN_VERSION,
            "recipe": self.recipe.table(),
            "rotated": [
                {"region": entry.region, "transform": transform_table(entry.transform)}
                for entry in self.rotated
            ],
            "online": [
                {"site": entry.site, "transform": transform_table(entry.transform)}
                for entry in self.online
            ],
            "quantized": [entry.table() for entry in self.quantized],
            "declined": [asdict(entry) for entry in self.declined],
            **({"paired": [asdict(entry) for entry in self.paired]} if self.paired else {}),
            **(
                {"changed": [_changed_table(entry) for entry in self.changed]}
                if self.changed
                else {}
            ),
        }

    @property
    def elements(self) -> tuple[Element | Kronecker, ...]:
        """What the plan holds by its numbers, each once."""
        given = [r.transform for r in self.rotated if isinstance(r.transform, Element)]
        run = [o.transform for o in self.online if isinstance(o.transform, Kronecker)]
        return tuple(dict.fromkeys((*given, *(c.element for c in self.changed), *run)))

    def filled(self, numbers: Mapping[str, Tensor]) -> Plan:
        """The same plan with the numbers of its elements, by digest."""

        def given(transform: T) -> T:
            if not isinstance(transform, Element | Kronecker):
                return transform
            return cast("T", transform.filled(numbers[transform.digest]))

        return replace(
            self,
            rotated=tuple(replace(r, transform=given(r.transform)) for r in self.rotated),
            changed=tuple(replace(c, element=given(c.element)) for c in self.changed),
            online=tuple(replace(o, transform=given(o.transform)) for o in self.online),
        )

    def json(self) -> str:
        """Text that `read` takes back; equal plans give equal text."""
        return json.dumps(self.table(), indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """The sha256 of the plan, hexadecimal."""
        text = json.dumps(self.table(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def joined(self, other: Plan) -> Plan:
        """These choices, and those of `other` for regions and sites that have none here."""
        return Plan(
            self.recipe,
            tuple({r.region: r for r in (*other.rotated, *self.rotated)}.values()),
            tuple({o.site: o for o in (*other.online, *self.online)}.values()),
            tuple({q.site: q for q in (*other.quantized, *self.quantized)}.values()),
            tuple({*self.declined, *other.declined}),
            tuple({p.region: p for p in (*other.paired, *self.paired)}.values()),
            tuple({_by_group(c): c for c in (*other.changed, *self.changed)}.values()),
        )

    @staticmethod
    def load(path: str | Path) -> Plan:
        """The plan in a file, with the numbers beside it; what cannot be read is a BadInput."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"plan {path}: cannot be read ({error})") from error
        plan = Plan.read(text)
        return plan.filled(load_numbers(Path(path), plan.elements)) if plan.elements else plan

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, whole or not at all, and its numbers to one beside it."""
        target = Path(path)
        save_numbers(target, self.elements)
        part = target.with_name(f"{target.name}.part{os.getpid()}")
        try:
            part.write_text(self.json(), encoding="utf-8")
            part.replace(target)
        except OSError as error:
            raise BadInput(f"plan {path}: cannot be written ({error.strerror})") from error

    @staticmethod
    def read(text: str) -> Plan:
        """The plan that `json` wrote, without numbers; anything else is a BadInput."""
        try:
            return _plan(json.loads(text))
        except json.JSONDecodeError as error:
            raise BadInput(f"plan: is not JSON ({error})") from error
        except (BadInput, UnknownName) as error:
            raise BadInput(f"plan: {error}") from error


def _sorted(what: str, entries: Iterable[T], key: Callable[[T], str]) -> tuple[T, ...]:
    found = tuple(sorted(entries, key=key))
    for one, other in itertools.pairwise(found):
        if key(one) == key(other):
            raise BadInput(f"{what}: {key(one)!r} is given twice")
    return found


def _plan(data: object) -> Plan:
    version = data.get("version") if isinstance(data, Mapping) else None
    expect_type(int, "version", version, "a plan with an integer version")
    if cast("int", version) > PLAN_VERSION:
        raise BadInput(f"version {version} is newer than {PLAN_VERSION}; update qpass to read it")
    expect(version == PLAN_VERSION, "version", version, str(PLAN_VERSION))
    names = ("version", *(field.name for field in fields(Plan)))
    # plans without these are written as they were before there were any
    absent: Mapping[str, object] = {"paired": [], "changed": []}
    record = _record("plan", {**absent, **cast("Mapping[str, object]", data)}, names)
    recipe = record["recipe"]
    expect(isinstance(recipe, Mapping), "recipe", recipe, "a table")
    return Plan(
        Recipe.read(cast("Mapping[str, object]", recipe)),
        tuple(map(_rotated, _list(record, "rotated"))),
        tuple(map(_online, _list(record, "online"))),
        tuple(map(_quantized, _list(record, "quantized"))),
        tuple(map(_declined, _list(record, "declined"))),
        tuple(map(_paired, _list(record, "paired"))),
        tuple(map(_changed, _list(record, "changed"))),
    )


def _rotated(data: object) -> Rotated:
    record = _record("rotated", data, ("region", "transform"))
    transform = read_transform(record["transform"])
    folds = isinstance(transform, Transform | Element)
    expect(folds, "transform", record["transform"], "a transform that weights absorb")
    return Rotated(_text(record, "region"), cast("Transform | Element", transform))


def _changed(data: object) -> Changed:
    record = _record("changed", data, ("region", "group", "element"))
    groups = [group.name for group in Group]
    expect(record["group"] in groups, "group", record["group"], " or ".join(groups))
    element = Element.read(_table(record, "element"))
    return Changed(_text(record, "region"), Group[str(record["group"])], element)


def _online(data: object) -> Online:
    record = _record("online", data, ("site", "transform"))
    return Online(_text(record, "site"), read_online(record["transform"]))


def _paired(data: object) -> Paired:
    record = _record("paired", data, ("region", "transform", "turned", "why"))
    turned = _list(record, "turned")
    for name in turned:
        expect_type(str, "turned", name, "a list of strings")
    transform = _transform(record["transform"])
    names = tuple(cast("list[str]", turned))
    return Paired(_text(record, "region"), transform, names, _text(record, "why"))


def _quantized(data: object) -> Quantized:
    record = _record("quantized", data, tuple(field.name for field in fields(Quantized)))
    roles = [role.value for role in Role]
    expect(record["role"] in roles, "role", record["role"], " or ".join(roles))
    rounding = _text(record, "rounding")
    ROUNDINGS[rounding]
    return Quantized(
        _text(record, "site"),
        Role(record["role"]),
        _spec(record, "weight"),
        None if record["activation"] is None else _spec(record, "activation"),
        rounding,
    )


def _declined(data: object) -> Declined:
    record = _record("declined", data, ("where", "why"))
    return Declined(_text(record, "where"), _text(record, "why"))


def transform_table(transform: Transform | Element | Kronecker) -> dict[str, object]:
    """A transform as JSON values, which `read_transform` takes back."""
    return asdict(transform) if isinstance(transform, Transform) else transform.table()


def read_transform(data: object) -> Transform | Element | Kronecker:
    """A transform by name, or the name of an element without its numbers."""
    if isinstance(data, Mapping) and "order" in data:
        return Kronecker.read(cast("Mapping[str, object]", data))
    if isinstance(data, Mapping) and "digest" in data:
        return Element.read(cast("Mapping[str, object]", data))
    return _transform(data)


def read_online(data: object) -> Transform | Kronecker:
    """A transform that can run with a model, as `transform_table` wrote it."""
    transform = read_transform(data)
    claim = isinstance(transform, Transform | Kronecker)
    expect(claim, "transform", data, "a transform that can run with the model")
    return cast("Transform | Kronecker", transform)


def _changed_table(entry: Changed) -> dict[str, object]:
    return {
        "region": entry.region,
        "group": entry.group.name,
        "element": entry.element.table(),
    }


def _by_group(entry: Changed) -> str:
    return f"{entry.region} under {entry.group.name}"


def _transform(data: object) -> Transform:
    record = _record("transform", data, tuple(field.name for field in fields(Transform)))
    rotation = _text(record, "rotation")
    ROTATIONS[rotation]
    numbers: dict[str, int] = {}
    for key, least in (("width", 1), ("seed", 0), ("heads", 1)):
        number = record[key]
        expect(type(number) is int and number >= least, key, number, f"an integer from {least}")
        numbers[key] = cast("int", number)
    lifted = record["lifted"]
    expect_type(bool, "lifted", lifted, "true or false")
    return Transform(rotation, lifted=bool(lifted), **numbers)


def _spec(record: Mapping[str, object], key: str) -> QuantSpec:
    return QuantSpec.read(_table(record, key))


def _table(record: Mapping[str, object], key: str) -> Mapping[str, object]:
    expect(isinstance(record[key], Mapping), key, record[key], "a table")
    return cast("Mapping[str, object]", record[key])


def _text(record: Mapping[str, object], key: str) -> str:
    expect_type(str, key, record[key], "a string")
    return cast("str", record[key])


def _list(record: Mapping[str, object], key: str) -> list[object]:
    expect_type(list, key, record[key], "a list")
    return cast("list[object]", record[key])


def _record(what: str, data: object, names: tuple[str, ...]) -> Mapping[str, object]:
    """`data` as a table that has exactly the keys `names`."""
    claim = isinstance(data, Mapping) and set(cast("Mapping[str, object]", data)) == set(names)
    expect(claim, what, data, f"a table of {', '.join(names)}")
    return cast("Mapping[str, object]", data)
