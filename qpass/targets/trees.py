"""Which floating tensors do arguments and outputs hold, at any depth?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

Convert = Callable[[Tensor], Tensor]


def floats(value: object) -> list[Tensor]:
    """The floating tensors in tuples, lists, dicts and dataclasses; other objects hold none."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    found: list[Tensor] = []
    for item in _items(value):
        found += floats(item)
    return found


def mapped(value: Any, convert: Convert) -> Any:  # noqa: ANN401  the same kind of tree comes back
    """The same tree with every floating tensor converted; parts that stay the same are shared."""
    if isinstance(value, Tensor):
        return convert(value) if value.is_floating_point() else value
    old = _items(value)
    new = [mapped(item, convert) for item in old]
    if all(one is other for one, other in zip(old, new, strict=True)):
        return value
    if isinstance(value, dict):
        # a dict with attributes of its own, as transformers returns, keeps them in step
        made = copy.copy(cast("dict[object, object]", value))
        for key, item in zip(list(made), new, strict=True):
            made[key] = item
        return made
    if isinstance(value, tuple):
        kind = cast("Any", type(cast("tuple[object, ...]", value)))
        return kind(*new) if hasattr(kind, "_fields") else kind(new)
    if isinstance(value, list):
        return new
    made = copy.copy(value)
    for field, item in zip(dataclasses.fields(value), new, strict=True):
        # a frozen one is still under construction
        object.__setattr__(made, field.name, item)
    return made


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast("dict[object, object]", value).values())
    if isinstance(value, list | tuple):
        return list(cast("list[object]", value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []
