"""How a call of the module maps to a program's inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qpass.errors import BadInput
from qpass.ir import Note, Program, read

Inputs = Tensor | Sequence[object] | Mapping[str, object]
# what finds the inputs of the parts of a model in a call of the whole
Record = Callable[[tuple[object, ...], dict[str, object]], tuple[object, ...]]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A program and how a call of the module maps to its inputs and outputs.

    `output_names` has one name for each output of `program.run`: `logits`, `hidden_states.0`. For a
    program of parts of a model, `record` finds their inputs in a call of the whole.
    """

    program: Program
    output_names: tuple[str, ...]
    notes: tuple[Note, ...]
    signature: inspect.Signature
    structure: pytree.TreeSpec
    positions: tuple[int, ...]
    extra: Mapping[str, object]
    record: Record | None = None

    def flatten(self, inputs: Inputs) -> tuple[object, ...]:
        """The arguments of `program.run` for a call of the module on `inputs`.

        Raises `BadInput` where they do not fit the traced call.
        """
        return self.flatten_call(*arguments(inputs, self.signature, self.extra))

    def flatten_call(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[object, ...]:
        """The same for arguments that are bound to the names of the signature."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if structure != self.structure:
            traced = _spelled(
                *pytree.tree_unflatten([None] * self.structure.num_leaves, self.structure)
            )
            given = _spelled(args, kwargs)
            apart = f"{given}, but the model was traced on {traced}"
            if given == traced:
                apart = f"{given}, but their tensors are nested otherwise than when it was traced"
            raise BadInput(f"a call has {apart}; every call takes the same arguments")
        if self.record is not None:
            return self.record(args, kwargs)
        taken = tuple(leaves[position] for position in self.positions)
        for node, leaf in zip(self.program.inputs, taken, strict=True):
            _check_shape(node, leaf)
        return taken


def arguments(
    inputs: Inputs, signature: inspect.Signature, extra: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The positional and keyword arguments of a call of the module, `extra` filled in.

    Raises `BadInput` where they do not fit its signature.
    """
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, list | tuple):
        args = tuple(cast("Sequence[object]", inputs))
    else:
        raise BadInput(
            f"inputs must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(inputs).__name__}"
        )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BadInput(f"the inputs do not fit the model's forward{signature}: {error}") from error
    return by_name(bound, extra)


def _is_size(value: object) -> bool:
    return isinstance(value, torch.Size)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def by_name(
    bound: inspect.BoundArguments, extra: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """One spelling of a call for all that mean the same: by name and in the signature's order."""
    bound.arguments |= {k: v for k, v in extra.items() if k not in bound.arguments}
    args: list[object] = []
    kwargs: dict[str, object] = {}
    for name, parameter in bound.signature.parameters.items():
        if name not in bound.arguments:
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            kwargs |= bound.arguments[name]
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            # what stands before *args can only be passed by position
            args = [*kwargs.values(), *bound.arguments[name]]
            kwargs = {}
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            args.append(bound.arguments[name])
        else:
            kwargs[name] = bound.arguments[name]
    # a trace takes sizes of tensors for tuples, and calls are compared with it
    return pytree.tree_map(_plain, (tuple(args), kwargs), is_leaf=_is_size)


def output_names(program: Program, spec: pytree.TreeSpec) -> tuple[str, ...]:
    """A name for each of the program's outputs, from the structure `spec` of what it returns."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named = dict(_leaf_names(tree, ""))
    names: dict[object, str] = {}
    for index, node in enumerate(read.returned(program.graph)):
        if isinstance(node, fx.Node):
            names.setdefault(node, named[index])
    return tuple(names[node] for node in program.outputs)


def _leaf_names(tree: object, name: str) -> Iterator[tuple[int, str]]:
    if isinstance(tree, int):
        yield tree, name or "0"
        return
    items: Iterator[tuple[object, object]]
    if isinstance(tree, Mapping):
        items = iter(cast("Mapping[object, object]", tree).items())
    elif isinstance(tree, list | tuple):
        items = iter(enumerate(cast("Sequence[object]", tree)))
    else:
        leaves = cast("list[object]", pytree.tree_leaves(tree))
        items = iter(enumerate(leaves))
    for key, item in items:
        yield from _leaf_names(item, f"{name}.{key}" if name else str(key))


def _spelled(args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    names = [f"argument {index}" for index in range(len(args))] + list(kwargs)
    return ", ".join(names) or "no arguments"


def _check_shape(node: fx.Node, leaf: object) -> None:
    like = read.fake(node)
    if like is None or not isinstance(leaf, Tensor):
        raise BadInput(f"input {node.name} must be a tensor, got {type(leaf).__name__}")
    fits = leaf.dim() == like.dim() and all(
        isinstance(want, torch.SymInt) or want == size
        for want, size in zip(read.shape(node), leaf.shape, strict=True)
    )
    if not fits:
        raise BadInput(
            f"input {node.name} has shape {list(leaf.shape)}, but the captured graph takes "
            f"{[str(size) for size in like.shape]}"
        )
    if leaf.is_floating_point() != like.is_floating_point():
        raise BadInput(
            f"input {node.name} is {leaf.dtype}, but the captured graph takes {like.dtype}"
        )
