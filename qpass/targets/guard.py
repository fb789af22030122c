"""How a changed model shows every value as it was: converted on its way in and out, or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from qpass.errors import Unsupported
from qpass.targets.doors import Door
from qpass.targets.gates import Family, Gate
from qpass.targets.trees import Convert, each, mapped

Forward = Callable[..., object]

# transformers asks for more outputs by arguments, or fields of its config, that begin so
_MORE = "output_"
_HOOKS = {
    "register_forward_hook": "_forward_hooks",
    "register_forward_pre_hook": "_forward_pre_hooks",
}
_GRADIENT_HOOKS = ("register_full_backward_hook", "register_full_backward_pre_hook")


@final
@dataclass(slots=True, eq=False)
class _Call:
    """A call of a model that is under way; `seen` remembers tensors where more outputs are wanted.

    Keys are the identities of tensors that `seen` itself keeps alive.
    """

    family: Family
    seen: dict[int, tuple[Tensor, Convert]] | None


@final
@dataclass(slots=True)
class _Trace:
    """The family whose root is being traced: what `_CALL` is to eager code, which cannot trace."""

    family: int | None = None


_CALL: ContextVar[_Call | None] = ContextVar("qpass_call", default=None)
_TRACE = _Trace()


def install(model: nn.Module, generations: Sequence[Sequence[Door]]) -> None:
    """Let every module of `model` show its values as they were before all `generations` of changes.

    A call from outside, of the model or of one of its parts, takes and returns original values;
    hooks see them. What cannot be converted raises `Unsupported` when it would be shown.
    """
    remove(model)
    family = Family.of(model, generations)
    if not family.suspects:
        return
    tables = [{door.module: door for door in doors} for doors in generations]
    for path, module in model.named_modules():
        gate = Gate(family, path, tuple(table.get(path) for table in tables))
        family.gates[path] = gate
        state = vars(module)
        if gate.root or gate.changed:
            inner = module.forward
            outer = functools.partial(_forward, gate, inner)
            state["forward"] = functools.update_wrapper(outer, inner)
            family.keep(path)
        for name, table in _HOOKS.items():
            held = cast("dict[int, Forward]", state[table])
            for key, hook in list(held.items()):
                kwargs = key in cast("dict[int, bool]", state[f"{table}_with_kwargs"])
                held[key] = functools.partial(_hook, gate, hook, kwargs)
            state[name] = functools.partial(_register, gate, _method(module, name))
        if gate.changed:
            state |= {name: functools.partial(_refuse, path) for name in _GRADIENT_HOOKS}


def remove(model: nn.Module) -> None:
    """Take all gates off again."""
    for module in model.modules():
        state = vars(module)
        if is_guarded(module):
            inner = inner_forward(module)
            del state["forward"]
            if module.forward != inner:
                state["forward"] = inner
        for name, table in _HOOKS.items():
            if name in state:
                del state[name]
            held = cast("dict[int, Forward]", state[table])
            for key, hook in list(held.items()):
                if isinstance(hook, functools.partial) and hook.func is _hook:
                    held[key] = hook.args[1]
        for name in _GRADIENT_HOOKS:
            state.pop(name, None)


def is_guarded(module: nn.Module) -> bool:
    """Whether the module's forward is behind a gate."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward


def inner_forward(module: nn.Module) -> Forward:
    """The module's forward without its gate: values are those of the changed model."""
    if not is_guarded(module):
        return module.forward
    return cast("Forward", cast("functools.partial[object]", vars(module)["forward"]).args[1])


def enter_by(model: nn.Module, keyword: str, module: nn.Module) -> None:
    """Say that a keyword of the model stands for what `module` returns."""
    if not is_guarded(model):
        return
    family = _gate(model).family
    for path, found in model.named_modules():
        if found is module:
            family.entrances[keyword] = family.gates[path]


def _gate(module: nn.Module) -> Gate:
    return cast("Gate", cast("functools.partial[object]", vars(module)["forward"]).args[0])


def _forward(gate: Gate, inner: Forward, /, *args: object, **kwargs: object) -> object:
    if torch.compiler.is_compiling():
        return _traced(gate, inner, args, kwargs)
    call = _CALL.get()
    if call is not None and call.family is gate.family:
        if call.seen is None:
            return inner(*args, **kwargs)
        _remember(call.seen, gate, (args, kwargs), leaving=False)
        result = inner(*args, **kwargs)
        _remember(call.seen, gate, result, leaving=True)
        return result
    gate.family.check()
    args, kwargs = gate.enter(args, kwargs)
    call = _Call(gate.family, {} if _wants_more(gate, kwargs) else None)
    token = _CALL.set(call)
    try:
        result = inner(*args, **kwargs)
    finally:
        _CALL.reset(token)
    seen = call.seen or {}

    def shown(tensor: Tensor) -> Tensor:
        known = seen.get(id(tensor))
        return gate.original(tensor, leaving=True) if known is None else known[1](tensor)

    return mapped(result, shown)


def _traced(
    gate: Gate, inner: Forward, args: tuple[object, ...], kwargs: dict[str, object]
) -> object:
    """The same while the code is traced, where tensors cannot be converted or remembered."""
    number = gate.family.number
    if _TRACE.family == number or (not gate.root and _eager_call() == number):
        return inner(*args, **kwargs)
    if (path := _replaced(number)) is not None:
        raise Family.broken(path)
    if not gate.root or _wants_more(gate, kwargs) or gate.strange((args, kwargs)):
        raise Unsupported(
            f"{gate.path or 'the model'}: this call takes or returns values whose basis qpass has "
            "changed, and a compiled or exported graph cannot convert them\n"
            "  compile the whole model and call it with tokens"
        )
    _TRACE.family = number
    try:
        return inner(*args, **kwargs)
    finally:
        _TRACE.family = None


@torch._dynamo.assume_constant_result
def _eager_call() -> int | None:
    """The family of the eager call in which something is traced."""
    call = _CALL.get()
    return None if call is None else call.family.number


@torch._dynamo.assume_constant_result
def _replaced(number: int) -> str | None:
    return Family.find(number).replaced()


def _wants_more(gate: Gate, kwargs: dict[str, object]) -> bool:
    if any(name.startswith(_MORE) and value for name, value in kwargs.items()):
        return True
    config = vars(gate.family.root).get("config")
    fields = cast("dict[str, object]", getattr(config, "__dict__", {}))
    return any(name.startswith(_MORE) and value is True for name, value in fields.items())


def _remember(
    seen: dict[int, tuple[Tensor, Convert]], gate: Gate, value: object, *, leaving: bool
) -> None:
    for tensor in each(value):
        # the first module that shows a tensor knows best what it is
        seen.setdefault(id(tensor), (tensor, functools.partial(gate.original, leaving=leaving)))


def _method(module: nn.Module, name: str) -> Forward:
    return cast("Forward", getattr(module, name))


def _register(
    gate: Gate, register: Forward, hook: Forward, *, with_kwargs: bool = False, **options: object
) -> object:
    wrapped = functools.partial(_hook, gate, hook, with_kwargs)
    return register(wrapped, with_kwargs=with_kwargs, **options)


def _hook(
    gate: Gate,
    hook: Forward,
    with_kwargs: bool,
    module: nn.Module,
    args: tuple[object, ...],
    *rest: object,
) -> object:
    """Call a user's hook with original values, and take what it returns for original ones."""
    if torch.compiler.is_compiling():
        raise Unsupported(f"{gate.path}: hooks of a model that qpass changed cannot be compiled")
    call = _CALL.get()
    if call is None or call.family is not gate.family:
        return hook(module, args, *rest)
    seen = call.seen

    def shown(value: object, *, leaving: bool) -> object:
        def show(tensor: Tensor) -> Tensor:
            found = gate.original(tensor, leaving=leaving)
            if seen is not None:
                seen[id(found)] = (found, _as_it_is)
            return found

        return mapped(value, show)

    before = len(rest) == int(with_kwargs)
    shown_rest = [shown(value, leaving=False) for value in rest[: int(with_kwargs)]]
    shown_rest += [shown(value, leaving=True) for value in rest[int(with_kwargs) :]]
    result = hook(module, shown(args, leaving=False), *shown_rest)
    if result is None:
        return None
    return mapped(result, functools.partial(gate.present, leaving=not before))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _refuse(path: str, *_: object, **__: object) -> object:
    raise Unsupported(
        f"{path}: qpass changed the basis of its values, so hooks on its gradients are refused\n"
        "  take gradients of a model that was not changed"
    )
