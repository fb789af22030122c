"""Where a model says that its parameters are tied, and how it stops saying so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qpass.ir import Program
from qpass.targets.conventions import parts_of_config

# in a config, and so in what is saved; and the map that is made from it when a model is built
_FLAG = "tie_word_embeddings"
_MAP = "all_tied_weights_keys"


def untie(model: nn.Module) -> None:
    """Let no config of the model ask for ties again.

    The configs are the model's own from then on: others may have been built from the same.
    """
    # one for all modules, so that what they share stays shared
    copies: dict[int, object] = {}
    for module in model.modules():
        state = vars(module)
        for name, value in list(state.items()):
            if next(_asking(value), None) is not None:
                state[name] = copy.deepcopy(value, copies)
        if state.get(_MAP):
            state[_MAP] = dict[str, str]()
    for module in model.modules():
        for value in vars(module).values():
            for fields in list(_asking(value)):
                fields[_FLAG] = False


def reads_flag(model: nn.Module, run: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether what `run` computes with `model` depends on whether its configs ask for ties.

    Some models scale what their head reads where it is tied. `run` calls the model on a sample.
    """
    asking = {
        id(fields): fields
        for module in model.modules()
        for value in vars(module).values()
        for fields in _asking(value)
    }
    if not asking:
        return False
    want = run()
    for fields in asking.values():
        fields[_FLAG] = False
    try:
        got = run()
    finally:
        for fields in asking.values():
            fields[_FLAG] = True
    return len(got) != len(want) or not all(map(_same, got, want))


def tied_uses(program: Program) -> frozenset[str]:
    """The uses of stored tensors that several modules hold."""
    paths: dict[str, set[str]] = {}
    for use, owner in program.owners.items():
        if (source := program.weights[use].source) is not None:
            paths.setdefault(source, set()).add(owner.path)
    return frozenset(
        use
        for use in program.owners
        if (source := program.weights[use].source) is not None and len(paths[source]) > 1
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _asking(found: object) -> Iterator[dict[str, object]]:
    """The fields of a config, and of those inside it, that have the flag set."""
    if isinstance(found, nn.Module):
        return
    try:
        fields = cast("dict[str, object]", vars(found))
    except TypeError:
        # plain values have no fields
        return
    # the default of a class counts where nothing else is said
    if fields.get(_FLAG, getattr(type(found), _FLAG, None)) is True:
        yield fields
    for part in parts_of_config(found):
        yield from _asking(part)
