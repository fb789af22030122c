"""What a call does at the gates of a changed model: values are converted where it crosses one.

A thread is inside when it runs the body of a changed module, where values are the changed ones;
everywhere else, hooks included, they are those of the model as it was.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.utils.hooks import RemovableHandle

from qpass.capture.parts import is_recorder, looks_away
from qpass.errors import StateError, Unsupported
from qpass.targets.conventions import is_collector
from qpass.targets.gates import Family, Gate, Seen, is_traced, note
from qpass.targets.trees import floats, mapped

# an entry of a module's own dict, and one of the functions that stand in for a forward
GATE = "_qpass_gate"
_MARK = "_qpass"
_BODY = "_qpass_body"


@final
class Twins:
    """Original and changed forms of the tensors that are shown to the hooks of one module.

    A tensor that hooks leave alone need not be converted back.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor, int]] = {}

    def show(self, changed: Tensor, *, leaving: bool) -> Tensor:
        """The original form of a tensor."""
        shown = self.gate.original(changed, leaving=leaving)
        # where nobody can tell that it was written to, or gradients have to pass, it is converted
        if shown is not changed and not shown.is_inference() and not shown.requires_grad:
            self._known[id(shown), leaving] = (shown, changed, shown._version)
        return shown

    def take(self, shown: Tensor, *, leaving: bool) -> Tensor:
        """The changed form of a tensor."""
        known = self._known.get((id(shown), leaving))
        if known is not None and known[0]._version == known[2]:
            return known[1]
        return self.gate.present(shown, leaving=leaving)


@final
class Here(threading.local):
    """Where this thread is: `seen` and `twins` belong to the call that is under way."""

    def __init__(self) -> None:
        self.inside = False
        self.seen: Seen | None = None
        self.twins: Twins | None = None


HERE = Here()


@contextmanager
def inside() -> Generator[None]:
    """Calls of changed modules take and return changed values."""
    before, HERE.inside = HERE.inside, True
    try:
        yield
    finally:
        HERE.inside = before


def gate_of(module: nn.Module) -> Gate:
    """The gate of a guarded module."""
    return cast("Gate", vars(module)[GATE])


def run_forward(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call the forward of a guarded module, from inside or from outside."""
    if HERE.inside and HERE.seen is None:
        return body_of(type(module))(module, *args, **kwargs)
    if HERE.inside:
        return _remembered(module, args, kwargs)
    gate, outer = gate_of(module), HERE.seen
    twins = HERE.twins if HERE.twins is not None and HERE.twins.gate is gate else None
    args, kwargs, more = begin(gate, twins, args, kwargs)
    seen = HERE.seen = {} if more and outer is None else outer
    HERE.inside = True
    try:
        if seen is None:
            result = body_of(type(module))(module, *args, **kwargs)
        else:
            result = _remembered(module, args, kwargs)
    finally:
        HERE.inside, HERE.seen = False, outer
    return end(gate, twins, result, seen if more else None)


def run_hooked(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call a guarded module whose hooks must see original values."""
    if not HERE.inside or _looked_away(module):
        return type(module)._call_impl(module, *args, **kwargs)
    if any(is_traced(tensor) for tensor in floats((args, kwargs))):
        raise Unsupported(
            f"{gate_of(module).path}: has hooks, which cannot be traced in a model that qpass "
            "changed\n  remove them, trace the model, and register them again"
        )
    outer = HERE.twins
    twins = HERE.twins = Twins(gate_of(module))
    args, kwargs = shown(twins, args, kwargs)
    HERE.inside = False
    try:
        result = type(module)._call_impl(module, *args, **kwargs)
    finally:
        HERE.inside, HERE.twins = True, outer
    return taken(twins, result)


def begin(
    gate: Gate, twins: Twins | None, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object], bool]:
    """The arguments of a call from outside as the changed module takes them.

    Also whether the call wants values of parts of the model returned.
    """
    check(gate.family)
    more = gate.family.asks_for_more(kwargs)
    if more:
        _guard_all(gate.family)
    if twins is None:
        return (*gate.enter(args, kwargs), more)
    args, kwargs = mapped((args, kwargs), lambda t: twins.take(t, leaving=False))
    return args, kwargs, more


def end(gate: Gate, twins: Twins | None, result: object, seen: Seen | None) -> object:
    """What a changed module returned, as it was before the changes."""
    if twins is None:
        return gate.leave(result, seen)
    found = mapped(result, lambda t: twins.show(t, leaving=True))
    _note_originals(found)
    return found


def shown(
    twins: Twins, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments of a call as hooks see them."""
    found = mapped((args, kwargs), lambda t: twins.show(t, leaving=False))
    _note_originals(found)
    return found


def taken(twins: Twins, result: object) -> object:
    """What hooks have left of a result, as the changed model goes on with it."""
    _note_originals(result)
    return mapped(result, lambda t: twins.take(t, leaving=True))


def _note_originals(value: object) -> None:
    if HERE.seen is not None:
        for tensor in floats(value):
            note(HERE.seen, tensor, ())


def _remembered(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call a forward in a call that will return some of what passes here."""
    assert HERE.seen is not None
    gate = gate_of(module)
    gate.remember(HERE.seen, (args, kwargs), leaving=False)
    # compiled code would not remember what passes
    forward = body_of(type(module))
    if "torch._dynamo" in sys.modules:
        forward = torch.compiler.disable(forward)
    result = forward(module, *args, **kwargs)
    gate.remember(HERE.seen, result, leaving=True)
    return result


# frames that dynamo runs as they are, while what they call is compiled
CALLERS = (run_forward, run_hooked)


def check(family: Family) -> None:
    """Raise unless the changed modules are where they were; let their hooks see original values."""
    if (path := family.replaced()) is not None:
        raise StateError(
            f"{path} was replaced after qpass changed the basis of its values\n"
            "  put adapters and resized embeddings in first, merged, and then call qpass"
        )
    if RemovableHandle.next_id == family.hooks_seen and not _lost_hooks(family):
        return
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        raise no_gradients("every module")
    seen = RemovableHandle.next_id
    always = bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
    family.hooked.clear()
    for module, gate in family.modules.items():
        if gate.root:
            continue
        backward = module._backward_hooks or module._backward_pre_hooks
        if backward and (gate.changed or not gate.known):
            raise no_gradients(gate.path)
        # a module of qpass's own lies inside of one whose calls a recorder sees
        watched = always or _is_watched(module, records=gate.known)
        _watch(module, gate, watched=watched)
        if watched:
            family.hooked.append(module)
    family.hooks_seen = seen


def _looked_away(module: nn.Module) -> bool:
    """Whether no hook of a module looks at the values of this call.

    It may have none: `torch.export` puts the dicts of modules back as they were when it began.
    """
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(looks_away(hook) for hook in hooks)


def _lost_hooks(family: Family) -> bool:
    """Whether hooks that were there have been removed."""
    return not all(_is_watched(module) for module in family.hooked)


def guard(module: nn.Module, gate: Gate) -> None:
    """Put a gate in front of the forward of a module."""
    kind = type(module)
    vars(module)[GATE] = gate
    if not hasattr(kind.forward, _BODY):
        vars(module)["forward"] = types.MethodType(_forward_of(kind), module)


def gated(body: Callable[..., object]) -> Callable[..., object]:
    """A forward of layers that are made for changed models: they need no gate in their own dicts.

    What stands there is a source that dynamo checks before each call of compiled code. A gate that
    has to convert leaves the graph.
    """

    @functools.wraps(body)
    def forward(self: nn.Module, /, *args: object, **kwargs: object) -> object:
        if (HERE.inside and HERE.seen is None) or getattr(self, GATE, None) is None:
            return body(self, *args, **kwargs)
        return run_forward(self, args, kwargs)

    setattr(forward, _BODY, body)
    return forward


def body_of(kind: type[nn.Module]) -> Callable[..., object]:
    """The forward of a class without the gate that may be part of it."""
    return getattr(kind.forward, _BODY, kind.forward)


def _guard_all(family: Family) -> None:
    """Guard every module that the graph knows, so that all that passes them is remembered."""
    for module, gate in family.modules.items():
        if gate.known and GATE not in vars(module) and "forward" not in vars(module):
            guard(module, gate)


def guarded_by(module: nn.Module) -> list[str]:
    """The entries of the module's own dict that are there because of its gate."""
    forward = vars(module).get("forward")
    ours = isinstance(forward, types.MethodType) and hasattr(forward.__func__, _MARK)
    found = [name for name in (GATE,) if name in vars(module)]
    return found + ["forward"] * ours + ["_call_impl"] * _is_hooked(module)


def _watch(module: nn.Module, gate: Gate, *, watched: bool) -> None:
    """Let the hooks of a module see original values, or leave it to itself again."""
    if watched is _is_hooked(module):
        return
    if not watched:
        del vars(module)["_call_impl"]
        return
    if GATE not in vars(module):
        # a forward that was put there later keeps its place, and calls the parts from outside
        vars(module)[GATE] = gate
        if "forward" not in vars(module):
            guard(module, gate)
    _keep_out_of_graphs(_hooked_call, None)
    vars(module)["_call_impl"] = types.MethodType(_hooked_call, module)


def _is_hooked(module: nn.Module) -> bool:
    call = vars(module).get("_call_impl")
    return isinstance(call, types.MethodType) and call.__func__ is _hooked_call


@functools.cache
def _forward_of(kind: type[nn.Module]) -> Callable[..., object]:
    """What stands in for the forward of a class, with its signature."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, /, *args: object, **kwargs: object) -> object:
        if HERE.inside and HERE.seen is None:
            return kind.forward(self, *args, **kwargs)
        return run_forward(self, args, kwargs)

    setattr(forward, _MARK, True)
    _keep_out_of_graphs(forward, kind)
    return forward


def _hooked_call(self: nn.Module, /, *args: object, **kwargs: object) -> object:
    return run_hooked(self, args, kwargs)


@functools.cache
def _keep_out_of_graphs(gate: Callable[..., object], kind: type[nn.Module] | None) -> None:
    # imported late: it takes longer than all of qpass
    from qpass.targets.tracing import keep_out

    keep_out(gate, kind)


def no_gradients(path: str) -> Unsupported:
    """What hooks on gradients meet."""
    return Unsupported(
        f"{path}: qpass changed the basis of its values, so hooks on its gradients are refused\n"
        "  take gradients of a model that was not changed"
    )


def _is_watched(module: nn.Module, *, records: bool = True) -> bool:
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(is_collector(hook) or (is_recorder(hook) and not records) for hook in hooks)


# what dynamo leaves alone with all that it calls
HELPERS = (begin, end, shown, taken, _remembered, gate_of, body_of, Twins.__init__)
