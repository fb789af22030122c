"""How a graph is evaluated: one node at a time, from values that somebody keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from qpass.ir.wide import WIDE

# what stands in for operators that gradients do not pass
DIFFERENTIABLE: dict[object, Callable[..., object]] = {}


def run_node(
    node: fx.Node,
    load: Callable[[fx.Node], object],
    *,
    widen: bool = False,
    gradients: bool = False,
) -> object:
    """What a node computes from the values that `load` finds.

    `widen` computes in float64, `gradients` by what gradients flow back through.
    """
    fetch = cast("Callable[[fx.Node], Any]", load)
    args: object = fx.map_arg(node.args, fetch)
    kwargs: object = fx.map_arg(node.kwargs, fetch)
    target = cast("Callable[..., object]", node.target)
    if widen:
        args, kwargs = _widen_dtypes(args), _widen_dtypes(kwargs)
        target = WIDE.get(target, target)
    if gradients:
        target = DIFFERENTIABLE.get(target, target)
    result = target(*cast("tuple[object, ...]", args), **cast("dict[str, object]", kwargs))
    return widened(result) if widen else result


def _widen_dtypes(arg: object) -> object:
    if isinstance(arg, torch.dtype):
        return torch.float64 if arg.is_floating_point else arg
    if isinstance(arg, dict):
        return {k: _widen_dtypes(v) for k, v in cast("dict[str, object]", arg).items()}
    if isinstance(arg, list | tuple):
        return type(arg)(_widen_dtypes(a) for a in cast("Sequence[object]", arg))
    return arg


def widened(result: object) -> object:
    """Floating tensors as float64, at any depth of sequences."""
    if isinstance(result, Tensor) and result.is_floating_point():
        return result.double()
    if isinstance(result, list | tuple):
        return type(result)(widened(r) for r in cast("Sequence[object]", result))
    return result


def fresh(inputs: Sequence[object]) -> tuple[object, ...]:
    """Inputs of their own for a program that may write to them."""
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nothing after it reads."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                last.setdefault(node, []).append(read)
    return last
