"""What gates do while code is traced: inside of a call they are not there.

A compiled module's own gate runs before the compiled code. Only where a module is called by code
that is itself compiled does a gate take part in the trace, and where it would have to convert
values it leaves the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._dynamo.decorators import skip

from qpass.errors import QpassError
from qpass.targets.conventions import asks_for_more
from qpass.targets.crossing import (
    CALLERS,
    HELPERS,
    HERE,
    check,
    end,
    run_forward,
    run_hooked,
)
from qpass.targets.gates import Family

_WHY = "a module that qpass changed converts values here; compile the whole model"

_LEAVE_ALONE = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)

_forward_aside: Any = torch.compiler.disable(run_forward, reason=_WHY)
_end_aside: Any = torch.compiler.disable(end, reason=_WHY)
_hooked_aside: Any = torch.compiler.disable(run_hooked, reason=_WHY)


def keep_out(gate: Callable[..., object], kind: Any) -> None:  # noqa: ANN401  any module's class
    """Run `gate` before a compiled call, and trace something else in its place within one.

    It stands for the forward of the class `kind`, or (None) for a call with hooks.
    """
    for caller in (gate, *CALLERS):
        skip(caller)
    for helper in HELPERS:
        set_code_exec_strategy(helper.__code__, _LEAVE_ALONE)
    traced = _traced_call if kind is None else _traced_forward(kind)
    torch.compiler.substitute_in_graph(gate, skip_signature_check=True)(traced)


def _traced_forward(kind: Any) -> Callable[..., object]:  # noqa: ANN401
    body = _traced_body(kind)

    def forward(self: nn.Module, /, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        if HERE.inside:
            return body(self, *args, **kwargs)
        gate: Any = self._qpass_gate
        if not gate.root or _obstacle(gate.family.number) or asks_for_more(kwargs, ()):
            return _forward_aside(self, args, kwargs)
        for tensor in _floats((args, kwargs)):
            if gate.history(tensor, leaving=False) != ():
                return _forward_aside(self, args, kwargs)
        HERE.inside = True
        try:
            result = body(self, *args, **kwargs)
        finally:
            HERE.inside = False
        for tensor in _floats(result):
            if gate.history(tensor, leaving=True) != ():
                return _end_aside(gate, None, result, None)
        return result

    return forward


def _traced_body(kind: Any) -> Callable[..., object]:  # noqa: ANN401
    """The forward of a class, in a form that can be traced."""

    def known(self: nn.Module, /, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        # asking for the type of `self` would add a guard for each pair of modules
        return kind.forward(self, *args, **kwargs)

    def asked(self: Any, /, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        return type(self).forward(self, *args, **kwargs)

    cells = [cell.cell_contents for cell in getattr(kind.forward, "__closure__", None) or ()]
    # any other object is known to a trace only by the way that leads to it
    plain = all(isinstance(held, FunctionType | type | str | int | None) for held in cells)
    return known if plain else asked


def _traced_call(self: nn.Module, /, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
    if not HERE.inside:
        kind: Any = type(self)
        return kind._call_impl(self, *args, **kwargs)
    return _hooked_aside(self, args, kwargs)


@torch.compiler.assume_constant_result
def _obstacle(number: int) -> bool:
    """Whether a model is in a state in which only its gates can say what happens."""
    family = Family.find(number)
    try:
        check(family)
    except QpassError:
        return True
    return family.asks_for_more({})


def _floats(value: object) -> list[Tensor]:
    """The floating tensors in plain containers, as far as tracing needs to look."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    found: list[Tensor] = []
    if isinstance(value, dict):
        for item in value.values():
            found += _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            found += _floats(item)
    return found
