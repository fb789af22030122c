"""Results that tracing cannot take apart: instances of dataclasses that models define."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import nn
from torch.utils import _pytree as pytree


def plain(result: object) -> object:
    """A result with dictionaries in place of dataclasses that pytree takes for leaves."""
    return pytree.tree_map(_fields, result)


def _fields(leaf: object) -> object:
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type | Mapping):
        return leaf
    return {f.name: plain(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)}


def is_plain(result: object) -> bool:
    """Whether a result holds no such dataclass."""
    return not any(
        dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
        for leaf in pytree.tree_leaves(result)
    )


@contextmanager
def plain_results(model: nn.Module) -> Generator[None]:
    """While open, `model` returns dictionaries in place of dataclasses."""
    state, forward = vars(model), cast("Callable[..., object]", model.forward)
    before = state.get("forward")

    @functools.wraps(forward)
    def call(*args: object, **kwargs: object) -> object:
        return plain(forward(*args, **kwargs))

    state["forward"] = call
    try:
        yield
    finally:
        del state["forward"]
        if before is not None:
            state["forward"] = before
