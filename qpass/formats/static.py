"""The static spec of a range: one scale for all values, and the code of zero."""

from __future__ import annotations

import dataclasses

import torch

from qpass.formats.spec import QuantSpec

# the reciprocal of a scale is finite in float32
SMALLEST = 2.0**-100


def spanning(spec: QuantSpec, low: float, high: float) -> QuantSpec:
    """The static spec whose points reach from `low` to `high`, zero among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        last = float(spec.whole_range[1]) if spec.integers else spec.codes.high
        return _static(spec, max(-low, high) / last, 0)
    first, last = spec.whole_range
    scale = (high - low) / (last - first)
    zero = round(first - low / scale) if scale > 0 else 0
    return _static(spec, scale, max(first, min(last, zero)))


def _static(spec: QuantSpec, scale: float, zero: int) -> QuantSpec:
    # as products read it; of nothing but zeros every scale serves
    stored = torch.tensor(scale, dtype=torch.float32, device="cpu").clamp(min=SMALLEST).item()
    return dataclasses.replace(spec, scale=stored, zero=zero)
