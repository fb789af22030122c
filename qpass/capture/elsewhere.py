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
def on_cpu(model: object) -> Generator[None]:
    """While open, a model that lies on one CUDA device is on the CPU; its parameters stay objects.

    So results do not depend on where a model was. What replaced its modules goes back with it. What
    is no model is refused by those who look at it.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    there = _device(model)
    if there is None or there.type != "cuda":
        yield
        return
    model.to("cpu")
    try:
        yield
    finally:
        model.to(there)


def _device(model: nn.Module) -> torch.device | None:
    """Where all of a model lies."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def to_cpu(inputs: T) -> T:
    """The same inputs, with tensors on CUDA devices copied to the CPU."""

    def moved(leaf: object) -> object:
        return leaf.cpu() if isinstance(leaf, Tensor) and leaf.device.type == "cuda" else leaf

    return pytree.tree_map(moved, inputs)
