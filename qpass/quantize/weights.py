"""How a weight of any shape becomes rows of codes, and back.

Shapes: n rows (all other axes, in order), k columns (the axis that the product sums over).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding import ROUNDINGS, Stats


def as_rows(weight: Tensor, axis: int) -> Tensor:
    """`[n, k]`: the weight with `axis` last and all others flattened."""
    moved = weight.movedim(axis, -1)
    return moved.reshape(moved.shape[:-1].numel(), moved.shape[-1])


def from_rows(rows_nk: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """The inverse of `as_rows`, for a weight of `shape`."""
    others = list(shape)
    k = others.pop(axis)
    return rows_nk.reshape(*others, k).movedim(-1, axis)


def refusal(shape: Sequence[int], spec: QuantSpec) -> str | None:
    """Why a weight of `shape` cannot take `spec`, or None when it can."""
    if not -len(shape) <= spec.axis < len(shape):
        return f"has {len(shape)} axes and no axis {spec.axis}"
    k = shape[spec.axis]
    return spec.supports((1, k))


def quantize_weight(
    weight: Tensor, spec: QuantSpec, rounding: str, stats: Stats | None = None
) -> QuantizedTensor:
    """Round a floating weight, whose rows run along `spec.axis`; it is not written to."""
    if (why := refusal(weight.shape, spec)) is not None:
        raise BadInput(f"weight {why}; quantize it per channel, or leave it float")
    method = ROUNDINGS[rounding]
    given: Stats = {} if stats is None else stats
    if missing := method.needs - given.keys():
        names = ", ".join(sorted(statistic.name for statistic in missing))
        raise BadInput(f"rounding {rounding!r} needs {names}: pass calibration data")
    return method.round(as_rows(weight, spec.axis), spec, given)


def dequantize_weight(
    quantized: QuantizedTensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight of `shape` that the codes stand for."""
    return from_rows(quantized.dequantize(dtype), shape, quantized.spec.axis)
