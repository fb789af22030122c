"""How a changed model shows every value as it was: gates on its modules convert, or refuse."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from torch import nn

from qpass.errors import StateError, Unsupported
from qpass.targets.changes import Door
from qpass.targets.conventions import RESIZE, resizable
from qpass.targets.crossing import GATE, check, gate_of, guard, guarded_by, no_gradients
from qpass.targets.gates import Family

_GRADIENT_HOOKS = (
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)


def install(
    model: nn.Module, generations: Sequence[Sequence[Door]], touched: Iterable[str]
) -> None:
    """Let every module of `model` show its values as they were before all `generations` of changes.

    A call from outside, of the model or of one of its parts, takes and returns original values;
    hooks see them. What cannot be converted raises `Unsupported` when it would be shown. Modules
    at the paths `touched` hold or use changed weights.
    """
    remove(model)
    for module in resizable(model):
        vars(module)[RESIZE] = _refuse_to_resize
    family = Family(model, generations)
    if not family.changes:
        return
    holders = {model.get_submodule(path) for path in touched}
    for module, gate in family.modules.items():
        # what is between is right without a gate: its parts have theirs, where values are used
        near = gate.root or (gate.changed and "." not in gate.path)
        if near or module in holders:
            if "forward" in vars(module):
                raise Unsupported(
                    f"{gate.path or 'the model'}: its forward has been replaced\n"
                    "  put the module's own back, call qpass, and replace it again"
                )
            guard(module, gate)
        if gate.changed or module in holders:
            family.keep(module)
        if gate.changed:
            refusal = functools.partial(_refuse_gradients, gate.path)
            vars(module).update(dict.fromkeys(_GRADIENT_HOOKS, refusal))
    check(family)


def is_guarded(module: nn.Module) -> bool:
    """Whether the module's forward is behind a gate."""
    return "forward" in guarded_by(module)


def whole(module: nn.Module) -> nn.Module | None:
    """The model that qpass changed `module` as a part of; None for a model or one of another."""
    if GATE not in vars(module) or gate_of(module).root:
        return None
    return gate_of(module).family.root


def remove(model: nn.Module) -> None:
    """Take all gates off again."""
    for module in model.modules():
        for name in _ours(module):
            del vars(module)[name]


@contextmanager
def suspended(model: nn.Module) -> Generator[None]:
    """While open, the model is the changed one throughout, and its parts may be replaced."""
    held = [(module, {n: vars(module)[n] for n in _ours(module)}) for module in model.modules()]
    remove(model)
    try:
        yield
    finally:
        for module, entries in held:
            vars(module).update(entries)


def _ours(module: nn.Module) -> list[str]:
    found = guarded_by(module)
    state = vars(module)
    for name in _GRADIENT_HOOKS:
        refusal = state.get(name)
        if isinstance(refusal, functools.partial) and refusal.func is _refuse_gradients:
            found.append(name)
    return found + [RESIZE] * (state.get(RESIZE) is _refuse_to_resize)


def _refuse_gradients(path: str, *_: object, **__: object) -> object:
    raise no_gradients(path)


def _refuse_to_resize(*_: object, **__: object) -> object:
    raise StateError(
        "the embedding was changed by qpass, and new rows would be in another basis\n"
        "  resize the float model first, then rotate or quantize it"
    )
