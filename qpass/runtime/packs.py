"""Which prepared weights exist: each is made once and shared by every graph that asks for it."""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from qpass.errors import StateError
from qpass.ir import Step, Weight
from qpass.runtime.values import State, is_freed, state

Parts = tuple[Tensor | None, ...]


class Form(abc.ABC):
    """How a weight is prepared for an operator: a frozen dataclass, so that equal forms share."""

    @abc.abstractmethod
    def make(self, weight: Tensor) -> Parts:
        """The tensors that an operator reads, from the float64 weight."""


@final
@dataclass(frozen=True, slots=True)
class AsFloat(Form):
    """One floating tensor: a bias or a table that a pass has changed."""

    dtype: torch.dtype

    def make(self, weight: Tensor) -> Parts:
        value = weight.to(self.dtype) if weight.is_floating_point() else weight
        # an evaluated weight may be a view of another, such as a transpose
        return (value.contiguous(),)


def prepared(weight: Weight, form: Form, sources: Mapping[str, Tensor]) -> Parts:
    """`form` of `weight`, made at most once while the tensors it comes from live unchanged.

    A tensor is known by its identity, not its name: graphs that call it differently share. Parts
    lie where the tensors do. Raises `StateError` where one would have to be made from a weight that
    was freed.
    """
    read: list[Tensor] = []
    key = (form, _identity(weight, sources, read))
    with _LOCK:
        if not read:
            return _FIXED.setdefault(key, form.make(weight.evaluate(sources)))
        kept = cast("dict[Hashable, _Kept]", _KEPT.setdefault(read[0], {}))
        states = tuple(map(state, read))
        if key not in kept or kept[key].states != states:
            for name, tensor in sources.items():
                if is_freed(tensor) and any(tensor is one for one in read):
                    raise StateError(
                        f"the float weight {name} was freed after it was packed, and is needed "
                        f"again as {form}\n  compile without free_weights"
                    )
            parts = form.make(weight.evaluate(sources))
            there = tuple(None if part is None else part.to(read[0].device) for part in parts)
            kept[key] = _Kept(states, there)
        return kept[key].parts


def depends_on(weight: Weight) -> tuple[str, ...]:
    """The names of all sources that a weight is evaluated from."""
    names: dict[str, None] = {}
    pending: list[object] = [weight]
    while pending:
        found = pending.pop()
        if isinstance(found, Weight) and found.source is not None:
            names[found.source] = None
        pending += _fields(found)
    return tuple(names)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    states: tuple[State, ...]
    parts: Parts


_LOCK = threading.RLock()
# by the first tensor that a weight comes from, with which it is freed
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()
# signs, ones and zeros: made from nothing, small and few
_FIXED: dict[Hashable, Parts] = {}


def _identity(value: object, sources: Mapping[str, Tensor], read: list[Tensor]) -> Hashable:
    """`value` with the tensors themselves in place of their names; `read` collects them."""
    if isinstance(value, Weight):
        tensor = None if value.source is None else sources[value.source]
        if tensor is not None:
            read.append(tensor)
        steps = tuple(_identity(step, sources, read) for step in value.steps)
        return (None if tensor is None else WeakIdRef(tensor), steps)
    if isinstance(value, Step):
        return (type(value), *(_identity(field, sources, read) for field in _fields(value)))
    return cast("Hashable", value)


def _fields(value: object) -> list[object]:
    if isinstance(value, Weight):
        return [*value.steps]
    if not isinstance(value, Step) or not dataclasses.is_dataclass(value):
        return []
    return [getattr(value, field.name) for field in dataclasses.fields(value)]
