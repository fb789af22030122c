"""Where a model says that its parameters are tied, and how it stops saying so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

from torch import nn

# in a config, and so in what is saved; and the map that is made from it when a model is built
_FLAG = "tie_word_embeddings"
_MAP = "all_tied_weights_keys"


def untie(model: nn.Module) -> Callable[[], None]:
    """Let no config of the model ask for ties again; returns what takes this back."""
    undo: list[tuple[dict[str, object], str, object]] = []
    for module in model.modules():
        state = vars(module)
        for config in _configs(state.get("config")):
            undo.append((config, _FLAG, config[_FLAG]))
            config[_FLAG] = False
        if state.get(_MAP):
            undo.append((state, _MAP, state[_MAP]))
            state[_MAP] = dict[str, str]()

    def again() -> None:
        for state, name, value in reversed(undo):
            state[name] = value

    return again


def _configs(found: object) -> Iterator[dict[str, object]]:
    """The fields of a config and of those inside it that have the flag set."""
    try:
        fields = cast("dict[str, object]", vars(found))
    except TypeError:
        # plain values have no fields
        return
    if fields.get(_FLAG):
        yield fields
    for name, value in list(fields.items()):
        if name.endswith("config"):
            yield from _configs(value)
