"""Which sizes of sample inputs are left open when a model is traced on them."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

Call = tuple[tuple[object, ...], dict[str, object]]


def doubled(inputs: Call) -> Call:
    """Sample inputs with two rows where all had one, since tracing takes a size of 1 as fixed."""
    leaves, structure = pytree.tree_flatten(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or any(tensor.shape[0] != 1 for tensor in tensors):
        return inputs
    leaves = [
        torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() > 0 else leaf
        for leaf in leaves
    ]
    return pytree.tree_unflatten(leaves, structure)


def dynamic_shapes(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Which sizes stay symbolic if the model allows it, in the layout that `export` asks for."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return {
        name: pytree.tree_map(_symbolic_sizes, value) for name, value in bound.arguments.items()
    }


def _symbolic_sizes(leaf: object) -> object:
    if not isinstance(leaf, Tensor):
        return None
    # tokens and masks: every size; features [b, t, d]: batch and time; images: the batch
    leading = leaf.dim() if not leaf.is_floating_point() else {2: 2, 3: 2}.get(leaf.dim(), 1)
    return {axis: Dim.AUTO for axis in range(min(leading, leaf.dim())) if leaf.shape[axis] > 1}
