"""How activations become integers: per row, from the row itself, after an optional rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import Integers, QuantSpec
from qpass.ops.hadamard import transformed
from qpass.ops.library import define

# rows below it count as zero, so that the reciprocal of the scale stays finite in float32
SMALLEST_ROW = 2.0**-100


def quantize_rows(
    x: Tensor,
    bits: int,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor]:
    """Symmetric integers `codes` (int8) and float32 `scales [..., 1]` with `x ~ codes * scales`.

    With `a` the row's largest magnitude and `q = 2**(bits-1) - 1`: `scales = a / q` and
    `codes = round(x * (q / a))`, ties to even, in float32. `signs`, `factor` and `power` are those
    of `hadamard`, applied first, in float32, without rounding to the dtype of `x`. A row of zeros
    gets scale 0. A row with a NaN or an infinity gets scale NaN and codes 0, so that everything
    computed from it is NaN.
    """
    return torch.ops.qpass.quantize_rows.default(x, bits, signs, factor, power)


def integer_rows(spec: QuantSpec) -> bool:
    """Whether this operator makes activations of `spec`: symmetric integers, a scale per token."""
    codes = spec.codes
    per_token = spec.block == "channel" and spec.scale_format == "float32"
    integers = isinstance(codes, Integers) and 2 <= codes.bits <= 8
    return spec.symmetric and per_token and integers


def _specification(
    x: Tensor, bits: int, signs: Tensor | None = None, factor: Tensor | None = None, power: int = 1
) -> tuple[Tensor, Tensor]:
    if not 2 <= bits <= 8:
        raise BadInput(f"activation codes have 2 to 8 bits, got {bits}")
    if (signs is None) != (factor is None):
        raise BadInput("a transform needs both signs and factor; pass both or neither")
    y = x.to(torch.float32)
    if signs is not None and factor is not None:
        y = transformed(y, signs, factor, power)
    largest_code = float(2 ** (bits - 1) - 1)
    if y.shape[-1] == 0:
        return y.to(torch.int8), y.new_zeros((*y.shape[:-1], 1))
    largest = y.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    counts = finite & (largest >= SMALLEST_ROW)
    # one division: a number divided by a tensor would round its reciprocal first
    to_codes = torch.full_like(largest, largest_code) / largest
    codes = torch.where(counts, (y * to_codes).round(), 0.0).clamp(-largest_code, largest_code)
    scales = torch.where(counts, largest / largest_code, 0.0)
    return codes.to(torch.int8), torch.where(finite, scales, torch.nan)


def _shapes(
    x: Tensor, bits: int, signs: Tensor | None = None, factor: Tensor | None = None, power: int = 1
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


define(
    "quantize_rows(Tensor x, int bits, Tensor? signs=None, Tensor? factor=None, int power=1)"
    " -> (Tensor, Tensor)",
    _specification,
    _shapes,
)
