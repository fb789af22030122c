"""Which formats are measured, and by which methods."""

from __future__ import annotations

from dataclasses import dataclass, field

from qpass.formats import QuantSpec
from qpass.plan import Recipe

PER_TOKEN = {bits: QuantSpec(f"int{bits}", dynamic=True) for bits in (4, 8)}


def _groups(bits: int, *, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(f"int{bits}", 64, scale_format="float16", symmetric=symmetric)


def _preset(name: str) -> tuple[QuantSpec, QuantSpec | None]:
    found = Recipe.read(name)
    assert found.weight is not None
    return found.weight, found.activation


# weights, and what is read: one scale for a row where no group is named; keys and values stay
# float, so that W4A4 is W4A4KV16
SETTINGS: dict[str, tuple[QuantSpec, QuantSpec | None]] = {
    "W8A8": (QuantSpec("int8"), PER_TOKEN[8]),
    "W4A8": (QuantSpec("int4"), PER_TOKEN[8]),
    "W4A4": (QuantSpec("int4"), PER_TOKEN[4]),
    "W4A16 g64": (_groups(4), None),
    "W4A16 g64 asymmetric": (_groups(4, symmetric=False), None),
    "W3A16 g64": (_groups(3), None),
    "W2A16 g64": (_groups(2), None),
    "MXFP4": _preset("mxfp4"),
    "NVFP4": _preset("nvfp4"),
}


@dataclass(frozen=True)
class Method:
    """Fields of a recipe; `seeded` methods draw something, so several seeds are measured.

    Methods that take long are measured for `settings`, and for all others when asked.
    """

    fields: dict[str, object] = field(default_factory=dict[str, object])
    seeded: bool = False
    settings: tuple[str, ...] = tuple(SETTINGS)


# transforms that are searched by gradients take minutes, and pay where few bits read a value
FEW_BITS = ("W4A8", "W4A4")
# reconstruction takes a quarter of an hour, and pays most where points are few
FEW_POINTS = ("W2A16 g64", "MXFP4")

METHODS = {
    "nearest": Method({"rotation": "off", "rounding": "nearest"}),
    "rounding": Method({"rotation": "off", "rounding": "auto"}),
    "rounding, blocks": Method(
        {"rotation": "off", "rounding": "auto", "refine": "blocks"}, settings=FEW_POINTS
    ),
    "rotated, nearest": Method({"rotation": "on", "rounding": "nearest"}, True, settings=()),
    "rotated, rounding": Method({"rotation": "on", "rounding": "auto"}, True),
    "rotated, rounding, blocks": Method(
        {"rotation": "on", "rounding": "auto", "refine": "blocks"}, True, settings=()
    ),
    "learned, rounding": Method(
        {"rotation": "on", "rounding": "auto", "transform": "learned"}, True, FEW_BITS
    ),
    "scaled and learned, rounding": Method(
        {"rotation": "on", "rounding": "auto", "transform": "smooth+learned"}, True, settings=()
    ),
}

# of models that are no language models
OF_OTHERS = ("nearest", "rounding", "rounding, blocks", "rotated, rounding")


def recipe(setting: str, method: str, seed: int) -> Recipe:
    """What is asked of a model; its embeddings and head stay float."""
    weight, activation = SETTINGS[setting]
    ends = {"head": "float", "embedding": "float"}
    fields = {"weight": weight, "activation": activation, "seed": seed, **ends}
    return Recipe.read({**fields, **METHODS[method].fields})
