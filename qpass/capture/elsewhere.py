"""How a model on a GPU is worked on: on the CPU, where all numbers of weights are made."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")


@contextmanager
def on_cpu(model: nn.Module) -> Generator[None]:
    """While open, a model that lies on one CUDA device is on the CPU; its parameters stay objects.

    So results do not depend on where a model was. What replaced its modules goes back with it.
    """
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors}
    there = devices.pop() if len(devices) == 1 else torch.device("cpu")
    if there.type != "cuda":
        yield
        return
    model.to("cpu")
    try:
        yield
    finally:
        model.to(there)


def to_cpu(inputs: T) -> T:
    """The same inputs, with tensors on CUDA devices copied to the CPU."""

    def moved(leaf: object) -> object:
        return leaf.cpu() if isinstance(leaf, Tensor) and leaf.device.type == "cuda" else leaf

    return pytree.tree_map(moved, inputs)
