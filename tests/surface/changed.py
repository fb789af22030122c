"""Models before and after qpass changed them, made once and copied for each test."""

from __future__ import annotations

import copy
import functools

from torch import Tensor, nn

import qpass
from tests.zoo import specimen

# what is left of two float64 models whose norms cast to float32 on the way
CLOSE = 1e-5
# eight bits on both sides; another basis or a missing gain is above 0.3
EIGHT_BITS = 0.15

KINDS = {"rotated": CLOSE, "quantized": EIGHT_BITS}


@functools.cache
def _made(name: str, kind: str) -> tuple[nn.Module, nn.Module]:
    entry = specimen(name)
    model = entry.build(0)
    changed = copy.deepcopy(model)
    if kind == "rotated":
        qpass.rotate(changed, entry.inputs())
    else:
        recipe = {"recipe": "w8a8", "rotation": "on"}
        qpass.quantize(changed, recipe, inputs=entry.inputs())
    return model, changed


def pair(name: str, kind: str = "rotated") -> tuple[nn.Module, nn.Module]:
    """A model of the zoo, and the same one changed."""
    model, changed = _made(name, kind)
    return copy.deepcopy(model), copy.deepcopy(changed)


def relative(want: Tensor, got: Tensor) -> float:
    """How far a tensor is from another, as a share of it."""
    assert want.shape == got.shape
    assert want.dtype == got.dtype
    want, got = want.detach().double(), got.detach().double()
    return float((want - got).norm() / want.norm().clamp(min=1e-300))


def first(output: object) -> Tensor:
    """The logits, or whatever else a model returns first."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def linear_paths(model: nn.Module) -> list[str]:
    """The parts that hold a matrix and no other parts."""
    return [
        path
        for path, module in model.named_modules()
        if next(module.children(), None) is None and any(p.dim() == 2 for p in module.parameters())
    ]
