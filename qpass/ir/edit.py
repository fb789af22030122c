"""Changes to a graph: insert, replace and erase, with metadata kept true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from qpass.ir.program import Owner, Program
from qpass.ir.read import operator
from qpass.ir.weights import Weight, Zeros

# what a node's metadata says of itself, not of where it comes from
TURN = "qpass_turn"
_OWN = ("val", "tensor_meta", TURN)


def call(
    program: Program,
    before: fx.Node,
    target: Callable[..., object],
    *args: object,
    like: fx.Node | None = None,
    **kwargs: object,
) -> fx.Node:
    """Insert a call in front of `before`; its fake value is computed, its origin is `like`'s."""
    node = _insert(program, before, target, args, kwargs, like if like is not None else before)
    node.meta["val"] = _fake_result(node)
    return node


def respell(
    program: Program,
    old: fx.Node,
    target: Callable[..., object],
    *args: object,
    **kwargs: object,
) -> fx.Node:
    """Insert a call that makes the same value as `old`, of the same type, in front of it."""
    node = _insert(program, old, target, args, kwargs, old)
    node.meta["val"] = old.meta["val"]
    return node


def _insert(
    program: Program,
    before: fx.Node,
    target: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    origin: fx.Node,
) -> fx.Node:
    with program.graph.inserting_before(before):
        node = program.graph.call_function(
            target, cast("tuple[Any, ...]", tuple(args)), cast("dict[str, Any]", dict(kwargs))
        )
    node.meta = {k: v for k, v in origin.meta.items() if k not in _OWN}
    return node


def after(program: Program, value: fx.Node) -> fx.Node:
    """The first node in front of which `value` can be read: placeholders stay together."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node


def add_weight(
    program: Program, name: str, weight: Weight, like: Tensor, owner: Owner | None = None
) -> fx.Node:
    """Add a use of a new weight; `like` is a fake tensor with its shape and dtype."""
    first = next(iter(program.graph.nodes))
    with program.graph.inserting_before(first):
        node = program.graph.placeholder(name)
    node.meta["val"] = like
    program.weights[node.name] = weight
    if owner is not None:
        program.owners[node.name] = owner
    return node


def add_bias(program: Program, node: str, use: str, length: int) -> str:
    """Let a product add a new bias of zeros, which lives beside its weight `use`."""
    like = program.node(use).meta["val"]
    owner = program.owners.get(use)
    made = add_weight(
        program,
        f"{use}_bias",
        Weight(None, (Zeros((length,)),)),
        like.new_empty((length,)),
        Owner(owner.module, "bias") if owner is not None else None,
    )
    set_argument(program.node(node), "bias", made)
    return made.name


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new` instead, then erase `old`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    old.graph.erase_node(old)


def redirect(user: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """Let `user` alone read `new` where it read `old`."""
    user.replace_input_with(old, new)


def own_use(program: Program, node: fx.Node, user: fx.Node) -> fx.Node:
    """A new use of the weight that `node` uses, read by `user` alone."""
    with program.graph.inserting_after(node):
        new = program.graph.placeholder(node.name)
    new.meta = dict(node.meta)
    program.weights[new.name] = program.weights[node.name]
    if (owner := program.owners.get(node.name)) is not None:
        program.owners[new.name] = owner
    redirect(user, node, new)
    return new


def derive_use(
    program: Program, node: fx.Node, weight: Weight, like: Tensor, owner: Owner | None
) -> fx.Node:
    """A use of `weight` placed behind the use `node`; `like` has its shape and element type."""
    with program.graph.inserting_after(node):
        new = program.graph.placeholder(node.name)
    new.meta = {**node.meta, "val": like}
    program.weights[new.name] = weight
    if owner is not None:
        program.owners[new.name] = owner
    return new


def retarget(node: fx.Node, target: Callable[..., object], *args: object, **kwargs: object) -> None:
    """Let `node` call another operator that computes the same value."""
    node.target = target
    node.args = cast("tuple[Any, ...]", args)
    node.kwargs = cast("dict[str, Any]", kwargs)


def set_argument(node: fx.Node, name: str, value: object) -> None:
    """Let `node` read `value` as the argument called `name`; defaults by name are left out."""
    op = operator(node)
    if op is None:
        raise TypeError(f"{node.format_node()}: has no schema")
    names = [declared.name for declared in op._schema.arguments]
    index = names.index(name)
    if index < len(node.args):
        node.update_arg(index, cast("Any", value))
    elif value == op._schema.arguments[index].default_value:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}
    else:
        node.update_kwarg(name, cast("Any", value))


def write_as_value(
    program: Program, write: fx.Node, value: fx.Node, pure: Callable[..., object]
) -> None:
    """Replace `write`, which changes `value` in place, by a call of `pure` that makes a new value.

    What reads `value` behind the write reads the new value instead; no view of it may be read.
    """
    new = _insert(program, write, pure, write.args, write.kwargs, write)
    new.meta["val"] = _fake_result(new)
    kept, made = cast("Tensor", value.meta["val"]), cast("Tensor", new.meta["val"])
    if made.dtype != kept.dtype:
        new = call(program, write, torch.ops.aten.to.dtype, new, kept.dtype)
    if made.shape != kept.shape:
        raise TypeError(f"{write.format_node()}: does not make a value of the same shape")
    behind = False
    for node in list(program.graph.nodes):
        if behind and value in node.all_input_nodes:
            redirect(node, value, new)
        behind = behind or node is write
    replace(write, new)


def fix(node: fx.Node, number: float) -> None:
    """Let every user of `node` read `number` instead, then erase `node`."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: number if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: number if n is node else n)
    node.graph.erase_node(node)


def order_inputs(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> None:
    """Let a function of this graph take its arguments in this order, each by a name of its own."""
    for node in reversed(placeholders):
        node.target = node.name
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)


def inline(node: fx.Node, body: fx.Graph, args: Sequence[object]) -> None:
    """Replace a call of `body` on `args`, whose results are read by index, with its nodes."""
    env: dict[fx.Node, Any] = dict(
        zip((n for n in body.nodes if n.op == "placeholder"), args, strict=True)
    )
    with node.graph.inserting_before(node):
        results = cast("Sequence[Any]", node.graph.graph_copy(body, env))
    for user in list(node.users):
        index = cast("int", user.args[1])
        replace(user, results[index])
    node.graph.erase_node(node)


def erase_dead(program: Program) -> None:
    """Erase what nothing reads, inputs excepted."""
    for node in reversed(list(program.graph.nodes)):
        if node.users or node.op == "output":
            continue
        if node.op == "placeholder":
            if node.name in program.weights:
                erase_weight(program, node)
        elif not node.is_impure():
            program.graph.erase_node(node)


def erase_weight(program: Program, node: fx.Node) -> None:
    """Erase a use that nothing reads."""
    program.graph.erase_node(node)
    del program.weights[node.name]
    program.owners.pop(node.name, None)


def rename_modules(graph: fx.Graph, names: Mapping[str, str]) -> None:
    """Let nodes say that they were traced in the module `names[path]` instead of `path`."""
    for node in graph.nodes:
        stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
        known = {key: (path.partition("@"), kind) for key, (path, kind) in stack.items()}
        if any(parts[0] in names for parts, _ in known.values()):
            node.meta["nn_module_stack"] = {
                key: (names.get(parts[0], parts[0]) + parts[1] + parts[2], kind)
                for key, (parts, kind) in known.items()
            }


def fake_like(program: Program, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without data, in the fake mode of the program's values."""
    for node in program.graph.nodes:
        found = node.meta.get("val")
        if isinstance(found, Tensor):
            return found.new_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device="meta")


def _fake_result(node: fx.Node) -> object:
    found = (
        fx.map_arg(node.args, lambda n: n.meta["val"]),
        fx.map_arg(node.kwargs, lambda n: n.meta["val"]),
    )
    fakes = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, FakeTensor)]
    # values of parts that were traced apart have modes of their own, weights go with any
    fakes.sort(key=lambda fake: not fake._has_symbolic_sizes_strides)
    mode = fakes[0].fake_mode if fakes else None

    def adopted(leaf: object) -> object:
        if mode is None or not isinstance(leaf, FakeTensor) or leaf.fake_mode is mode:
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)

    # operators that are made of others make constants on the way
    with torch.no_grad(), nullcontext() if mode is None else mode:
        args, kwargs = pytree.tree_map(adopted, found)
        return cast("Callable[..., object]", node.target)(
            *cast("tuple[Any, ...]", args), **cast("dict[str, Any]", kwargs)
        )
