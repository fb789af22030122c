"""Transforms that go by numbers rather than by a name: what a checkpoint has of them."""

from __future__ import annotations

import torch

from qpass.errors import Unsupported
from qpass.rotations import Kronecker, Transform
from qpass.targets.tensors import Shapes

# what a checkpoint calls the factor of a transform that has no name
NUMBERS = "transform"


def numbers_of(transform: Transform | Kronecker | None) -> Shapes:
    """The shape and type of what a checkpoint has of a transform, beside its name."""
    if not isinstance(transform, Kronecker):
        return {}
    return {NUMBERS: ((transform.order, transform.order), torch.float64)}


def by_name(transform: Transform | Kronecker, where: str) -> Transform:
    """A transform that a layer without codes can hold; Unsupported for one by its numbers."""
    if isinstance(transform, Kronecker):
        raise Unsupported(
            f"{where}: only layers that are quantized hold a transform by its numbers\n"
            "  leave the input of its products as it is, or quantize its weight"
        )
    return transform
