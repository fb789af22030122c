"""Where in the module each use of a weight lives, and with which plain steps it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from qpass.ir import Affine, Owner, Permute, Program, Reshape, Step, edit, read

aten = torch.ops.aten

# the same entries in the same order
_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)


def split_uses(program: Program) -> None:
    """Give every reader of a weight its own placeholder."""
    for node in _uses(program):
        for user in list(node.users)[1:]:
            edit.own_use(program, node, user)


def name_modules_from_root(program: Program, module: nn.Module) -> None:
    """Let modules go by their paths from the root, also inside of one with a forward of its own.

    What such a forward calls is traced by paths from the module that the forward belongs to.
    """
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    for node in program.graph.nodes:
        stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
        found = dict[str, tuple[str, object]]()
        around: list[str] = []
        for key, (path, kind) in stack.items():
            plain, mark, call = path.partition("@")
            if not any(plain.startswith(f"{outer}.") for outer in around):
                inside = (f"{outer}.{plain}" for outer in reversed(around))
                plain = next((path for path in inside if path in paths), plain)
            found[key] = (plain + mark + call, kind)
            around += [plain] if plain else []
        if found != stack:
            node.meta["nn_module_stack"] = found


def name_modules_once(program: Program, module: nn.Module) -> None:
    """Let a module that is registered in several places go by the first of its names everywhere."""
    first = {id(inner): path for path, inner in module.named_modules()}
    every = module.named_modules(remove_duplicate=False)
    again = {path: first[id(inner)] for path, inner in every if first[id(inner)] != path}
    if again:
        edit.rename_modules(program.graph, again)


def find_owners(program: Program, module: nn.Module, names: Mapping[str, str]) -> None:
    """Record for each use the innermost module around its reader that holds the very tensor.

    Functional uses have no such module and belong to the tensor's own name; `names` maps sources
    to those. A source without a name (a constant in the code) belongs to nothing.
    """
    for node in _uses(program):
        source = program.weights[node.name].source
        if source is None or source not in names:
            continue
        owner = _innermost(node, module, program.sources[source])
        if owner is None:
            path, _, attribute = names[source].rpartition(".")
            owner = Owner(path, attribute)
        program.owners[node.name] = owner


def lift(program: Program) -> None:
    """Turn what the code does to a weight alone (transposes, `1 + w`, casts) into its steps."""
    pending = list(_uses(program))
    while pending:
        node = pending.pop()
        for user in list(node.users):
            found = _steps(node, user)
            if found is None:
                continue
            weight, owner = program.weights[node.name], program.owners.get(node.name)
            for step in found:
                weight = weight.then(step)
            if owner is not None:
                owner = Owner(owner.module, owner.attribute, (*owner.prefix, *found))
            like = read.fake(user)
            assert like is not None
            new = edit.derive_use(program, node, weight, like, owner)
            edit.replace(user, new)
            pending.append(new)
        if not node.users:
            edit.erase_weight(program, node)


def _uses(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if program.weight(n) is not None]


def _innermost(node: fx.Node, module: nn.Module, tensor: Tensor) -> Owner | None:
    for user in node.users:
        for path in reversed(read.module_stack(user)):
            inner = module.get_submodule(path)
            held = {
                **dict(inner.named_parameters(recurse=False, remove_duplicate=False)),
                **dict(inner.named_buffers(recurse=False, remove_duplicate=False)),
            }
            for attribute, value in held.items():
                if value is tensor:
                    return Owner(path, attribute)
    return None


def _steps(weight: fx.Node, user: fx.Node) -> tuple[Step, ...] | None:
    """The steps that `user` does to `weight` alone, or None where it does something else."""
    like = read.fake(user)
    if user.all_input_nodes != [weight] or like is None or read.operator(user) is None:
        return None
    shape = read.static_shape(user)
    if user.target in _RESHAPES:
        return None if shape is None else (Reshape(shape),)
    if (order := _order(weight, user)) is not None:
        return (Permute(order),)
    if not read.is_floating(weight) or not like.is_floating_point():
        return None
    # run and write-back round to the element type of the use, so a cast needs no step
    if read.calls(user, aten.to.dtype):
        return ()
    affine = _affine(user)
    return None if affine is None else (affine,)


def _order(weight: fx.Node, user: fx.Node) -> tuple[int, ...] | None:
    axes = list(range(len(read.shape(weight))))
    if read.calls(user, aten.t.default, aten.numpy_T.default, aten.matrix_H.default):
        return tuple(reversed(axes))
    if read.calls(user, aten.mT.default):
        return (*axes[:-2], axes[-1], axes[-2])
    if read.calls(user, aten.transpose.int):
        a, b = (read.flat_axis(weight, read.integer(user, name)) for name in ("dim0", "dim1"))
        axes[a], axes[b] = axes[b], axes[a]
        return tuple(axes)
    if read.calls(user, aten.permute.default):
        return tuple(read.flat_axis(weight, int(str(d))) for d in read.sizes(user, "dims"))
    return None


def _affine(user: fx.Node) -> Affine | None:
    if read.calls(user, aten.neg.default):
        return Affine(-1.0, 0.0)
    if not read.calls(
        user, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.div.Tensor
    ):
        return None
    other = read.number(user, "other")
    if other is None:
        return None
    if read.calls(user, aten.mul.Tensor):
        return Affine(other, 0.0)
    if read.calls(user, aten.div.Tensor):
        return Affine(1.0 / other, 0.0)
    shift = other * (read.number(user, "alpha") or 0.0)
    if read.calls(user, aten.rsub.Scalar):
        # other - alpha * weight
        return Affine(-(read.number(user, "alpha") or 0.0), other)
    return Affine(1.0, -shift if read.calls(user, aten.sub.Tensor) else shift)
