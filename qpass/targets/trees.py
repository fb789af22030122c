"""Which floating tensors do arguments and outputs hold, at any depth?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

Convert = Callable[[Tensor], Tensor]


def each(value: object) -> list[Tensor]:
    """The floating tensors in tuples, lists and dicts; other objects are left alone."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(cast("dict[object, object]", value).values())
    if not isinstance(value, list | tuple):
        return []
    found: list[Tensor] = []
    for item in cast("list[object]", value):
        found += each(item)
    return found


def mapped(value: Any, convert: Convert) -> Any:  # noqa: ANN401  the same kind of tree comes back
    """The same tree with every floating tensor converted."""
    if isinstance(value, Tensor):
        return convert(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        # a dict with attributes of its own, as transformers returns, keeps them in step
        made = copy.copy(cast("dict[object, object]", value))
        for key, item in list(made.items()):
            made[key] = mapped(item, convert)
        return made
    if isinstance(value, tuple):
        items = [mapped(item, convert) for item in cast("tuple[object, ...]", value)]
        kind = cast("Any", type(value))
        return kind(*items) if kind is not tuple else tuple(items)
    if isinstance(value, list):
        return [mapped(item, convert) for item in cast("list[object]", value)]
    return value
