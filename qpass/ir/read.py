"""Typed reads of fx nodes: the only place that looks into a node's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

Size = int | torch.SymInt


def operator(node: fx.Node) -> OpOverload | None:
    """The ATen (or qpass) operator a node calls, or None for anything else."""
    return node.target if isinstance(node.target, OpOverload) else None


def calls(node: object, *targets: object) -> bool:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, name: str) -> object:
    """The argument called `name` in the operator's schema, its default where it is absent."""
    op = operator(node)
    if op is None:
        raise TypeError(f"{node.format_node()}: has no schema")
    for index, declared in enumerate(op._schema.arguments):
        if declared.name != name:
            continue
        if not declared.kwarg_only and index < len(node.args):
            return node.args[index]
        if name in node.kwargs:
            return node.kwargs[name]
        return declared.default_value
    raise TypeError(f"{node.format_node()}: {op} has no argument {name!r}")


def value(node: fx.Node, name: str) -> fx.Node:
    """The graph value passed as `name`."""
    found = argument(node, name)
    if not isinstance(found, fx.Node):
        raise TypeError(f"{node.format_node()}: {name} is {found!r}, not a graph value")
    return found


def optional_value(node: fx.Node, name: str) -> fx.Node | None:
    """The graph value passed as `name`, or None when it is absent, None or a number."""
    found = argument(node, name)
    return found if isinstance(found, fx.Node) else None


def values(node: fx.Node, name: str) -> tuple[fx.Node, ...]:
    """The graph values passed as the list `name`."""
    found = cast("Sequence[object]", argument(node, name))
    if not all(isinstance(item, fx.Node) for item in found):
        raise TypeError(f"{node.format_node()}: {name} is {found!r}, not a list of graph values")
    return tuple(cast("Sequence[fx.Node]", found))


def integer(node: fx.Node, name: str) -> int:
    """The integer passed as `name`."""
    found = argument(node, name)
    if not isinstance(found, int):
        raise TypeError(f"{node.format_node()}: {name} is {found!r}, not an integer")
    return found


def number(node: fx.Node, name: str) -> float | None:
    """The constant number passed as `name`, or None when it is something else."""
    found = argument(node, name)
    return float(found) if isinstance(found, int | float) else None


def sizes(node: fx.Node, name: str) -> tuple[object, ...]:
    """The list passed as `name`, whose items are integers or graph values."""
    found = argument(node, name)
    return (found,) if isinstance(found, int) else tuple(cast("Sequence[object]", found))


def fake(node: fx.Node) -> Tensor | None:
    """The tensor without data that describes a value, or None for a value that is no tensor."""
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def shape(node: fx.Node) -> tuple[Size, ...]:
    """The shape of a tensor value; sizes may be symbolic."""
    found = fake(node)
    if found is None:
        raise TypeError(f"{node.format_node()}: is not a tensor")
    return tuple(found.shape)


def is_floating(node: fx.Node) -> bool:
    """Whether a value is a tensor of real numbers."""
    found = fake(node)
    return found is not None and found.is_floating_point()


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module a node was traced in; empty for the root."""
    stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
    return list(stack.values())[-1][0] if stack else ""
