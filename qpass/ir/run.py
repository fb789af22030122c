"""How a graph is evaluated: one node at a time, from values that somebody keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    device: torch.device | None = None,
) -> object:
    """What a node computes from the values that `load` finds.

    `widen` computes in float64, `gradients` by what gradients flow back through. Tensors that it
    makes are on `device`, wherever those of the traced code were.
    """
    fetch = cast("Callable[[fx.Node], Any]", load)
    args: object = fx.map_arg(node.args, fetch)
    kwargs: object = fx.map_arg(node.kwargs, fetch)
    target = cast("Callable[..., object]", node.target)
    if widen:
        target = WIDE.get(target, target)
    if gradients:
        target = DIFFERENTIABLE.get(target, target)
    args, kwargs = _written(args, widen, device), _written(kwargs, widen, device)
    result = target(*cast("tuple[object, ...]", args), **cast("dict[str, object]", kwargs))
    return widened(result) if widen else result


def _written(arg: object, widen: bool, device: torch.device | None) -> object:
    """What the code says about types and devices, as it is run."""
    if isinstance(arg, torch.dtype):
        return torch.float64 if widen and arg.is_floating_point else arg
    if isinstance(arg, torch.device):
        return arg if device is None else device
    if isinstance(arg, dict):
        named = cast("dict[str, object]", arg)
        return {k: _written(v, widen, device) for k, v in named.items()}
    if isinstance(arg, list | tuple):
        return type(arg)(_written(a, widen, device) for a in cast("Sequence[object]", arg))
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


def run_nodes(
    nodes: Iterable[fx.Node],
    values: dict[fx.Node, object],
    load: Callable[[fx.Node, fx.Node], object],
    last: Mapping[fx.Node, Sequence[fx.Node]],
    *,
    widen: bool = False,
    gradients: bool = False,
    device: torch.device | None = None,
    made: Callable[[fx.Node, object], object] = lambda _, value: value,
    instead: Callable[[fx.Node, Callable[[fx.Node], object]], object] | None = None,
) -> None:
    """Run calls in order, each on what `load` finds for it; what nothing later reads is dropped.

    `last` says so for each node. `made` may put something else in the place of what a node makes;
    `instead` may make it in another way, or give None.
    """
    for node in nodes:
        if node.op != "call_function":
            continue

        def fetch(of: fx.Node, node: fx.Node = node) -> object:
            return load(node, of)

        value = None if instead is None else instead(node, fetch)
        if value is None:
            value = run_node(node, fetch, widen=widen, gradients=gradients, device=device)
        values[node] = made(node, value)
        for dead in last.get(node, ()):
            values.pop(dead, None)
