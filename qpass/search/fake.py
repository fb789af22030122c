"""What a quantized tensor reads as, with gradients that pass its rounding."""

# r rows, k columns, b blocks, l entries of a block

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qpass.formats import Format, Integers, QuantSpec

# of the largest magnitude: where the last point of a grid may lie
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
# a block of zeros has a scale, too
_TINY = 1e-12


def fake(x: Tensor, spec: QuantSpec, clip: float = 1.0) -> Tensor:
    """`x` as `spec` stores it, blocks along the last axis, with scales from its extremes.

    The last point of each grid lies at `clip` times the extreme. The gradient is that of a rounding
    whose residue is a constant number of steps, so a smaller step is a smaller error.
    """
    x_bl = x.reshape(-1, _length(x, spec))
    codes = spec.codes
    if spec.symmetric:
        offset_b1: Tensor | float = 0.0
        extreme_b1 = x_bl.gather(-1, x_bl.detach().abs().argmax(-1, keepdim=True))
        if spec.dynamic:
            scale_b1 = extreme_b1.abs() * (clip / min(codes.high, -codes.low))
        else:
            # the side with one more level faces the extreme, as in stored weights
            scale_b1 = extreme_b1 * (clip / codes.low)
    else:
        low_b1, high_b1 = (end * clip for end in x_bl.aminmax(dim=-1, keepdim=True))
        low_b1 = low_b1.clamp(max=0)
        scale_b1 = (high_b1.clamp(min=0) - low_b1) / (codes.high - codes.low)
        offset_b1 = low_b1 - codes.low * scale_b1
    scale_b1 = torch.where(scale_b1.abs() < _TINY, _TINY, scale_b1)
    steps_bl = (x_bl - offset_b1) / scale_b1
    return (_rounded(steps_bl, codes) * scale_b1 + offset_b1).reshape(x.shape)


def best_clip(x: Tensor, spec: QuantSpec) -> float:
    """The one of `CLIPS` that loses least of a tensor."""
    with torch.no_grad():
        return min(CLIPS, key=lambda clip: float((fake(x, spec, clip) - x).square().sum()))


def _rounded(steps: Tensor, codes: Format) -> Tensor:
    if isinstance(codes, Integers):
        inside = steps.clamp(codes.low, codes.high)
        return inside + (inside.detach().round() - inside.detach())
    points = _points(codes).to(steps)
    inside = steps.clamp(codes.low, codes.high)
    at = torch.bucketize(inside.detach(), (points[1:] + points[:-1]) / 2)
    return inside + (points[at] - inside.detach())


@functools.cache
def _points(codes: Format) -> Tensor:
    """Every point of a format of single numbers, in order."""
    found = codes.decode(codes.codes()).double().reshape(-1)
    return found[found.isfinite()].unique()


def _length(x: Tensor, spec: QuantSpec) -> int:
    if spec.block == "tensor":
        return max(1, x.numel())
    return int(x.shape[-1]) if spec.block == "channel" else spec.block
