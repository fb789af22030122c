"""Typed reads of fx nodes: the only place that looks into a node's arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

Size = int | torch.SymInt

_LOCAL = re.compile(r"^L\['\w+'\]\.?")


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


def has(node: fx.Node, name: str) -> bool:
    """Whether the operator of a call has an argument called `name`."""
    op = operator(node)
    return op is not None and any(declared.name == name for declared in op._schema.arguments)


def plain_arguments(node: fx.Node) -> tuple[object, ...]:
    """The positional arguments of a call that has no schema."""
    return node.args


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


def optional_values(node: fx.Node, name: str) -> tuple[fx.Node | None, ...]:
    """The graph values passed as the list `name`, whose items may be None."""
    found = cast("Sequence[object]", argument(node, name))
    if not all(item is None or isinstance(item, fx.Node) for item in found):
        raise TypeError(f"{node.format_node()}: {name} is {found!r}, not a list of graph values")
    return tuple(cast("Sequence[fx.Node | None]", found))


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


def returned(graph: fx.Graph) -> tuple[object, ...]:
    """What a graph returns, in order: values and constants."""
    found = graph.output_node().args[0]
    return tuple(cast("Sequence[object]", found)) if isinstance(found, list | tuple) else (found,)


def fake(node: fx.Node) -> Tensor | None:
    """The tensor without data that describes a value, or None for a value that is no tensor."""
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else None


def shape(node: fx.Node) -> tuple[Size, ...]:
    """The shape of a tensor value; sizes may be symbolic."""
    found = fake(node)
    if found is None:
        raise TypeError(f"{node.format_node()}: is not a tensor")
    return tuple(_size(size) for size in found.shape)


def _size(size: Size) -> Size:
    if isinstance(size, int):
        return size
    # a symbol that a later guard has fixed is a number
    known = size.node.maybe_as_int()
    return size if known is None else int(known)


def hint(size: Size) -> int:
    """A size of the sample inputs; 1 where none is known."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def dtype(node: fx.Node) -> torch.dtype | None:
    """The element type of a tensor value, or None for a value that is no tensor."""
    found = fake(node)
    return None if found is None else found.dtype


def static_shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a tensor value, or None when it is symbolic or the value is no tensor."""
    if fake(node) is None:
        return None
    sizes = shape(node)
    fixed = tuple(size for size in sizes if isinstance(size, int))
    return fixed if len(fixed) == len(sizes) else None


def same_size(a: object, b: object) -> bool:
    """Whether two sizes are equal for every input; two symbols must be the same expression."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        # comparing symbolic integers with == would add a guard
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensor values have one shape for every input."""
    return fake(b) is not None and has_shape(a, shape(b))


def has_shape(node: fx.Node, sizes: tuple[Size, ...]) -> bool:
    """Whether a tensor value has this shape for every input."""
    if fake(node) is None or len(shape(node)) != len(sizes):
        return False
    return all(same_size(m, n) for m, n in zip(shape(node), sizes, strict=True))


def same_type(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensor values have one element type, and one shape for every input."""
    return dtype(a) == dtype(b) and same_shape(a, b)


def writes(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments."""
    op = operator(node)
    return op is not None and op._schema.is_mutable


def written(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that a node changes."""
    op = operator(node)
    if op is None:
        return ()
    names = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    found = (argument(node, name) for name in names)
    return tuple(n for n in found if isinstance(n, fx.Node))


def flat_axis(node: fx.Node, axis: int) -> int:
    """`axis` of a tensor value, counted from the front."""
    return axis % max(len(shape(node)), 1)


def uncast(node: fx.Node) -> fx.Node:
    """The value behind casts between floating types, which do nothing over the reals."""
    while calls(node, torch.ops.aten.to.dtype) and is_floating(node):
        source = value(node, "self")
        if not is_floating(source):
            break
        node = source
    return node


def readers(node: fx.Node) -> tuple[fx.Node, ...]:
    """What reads a value, looking through casts between floating types."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers(user) if uncast(user) is not user else [user]
    return tuple(found)


def is_floating(node: fx.Node) -> bool:
    """Whether a value is a tensor of real numbers."""
    found = fake(node)
    return found is not None and found.is_floating_point()


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module a node was traced in; empty for the root."""
    stack = module_stack(node)
    return stack[-1] if stack else ""


def module_stack(node: fx.Node) -> tuple[str, ...]:
    """The dotted paths of the modules a node was traced in, outermost first."""
    stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
    # a module that runs several times is traced as `path@1`, `path@2`, ...; dynamo starts paths at
    # a local variable, `L['self'].path`
    paths = (path.partition("@")[0] for path, _ in stack.values())
    return tuple(_LOCAL.sub("", path) for path in paths)


def target_name(node: fx.Node) -> str:
    """What a node calls, in words that are the same on every machine."""
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return node.target if isinstance(node.target, str) else node.target.__name__
