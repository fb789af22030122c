"""Quantized linear layers with a branch of low rank beside them: on a GPU, one kernel for both.

What few large singular values hold need not be quantized (SVDQuant: Absorbing Outliers by Low-Rank
Components for 4-Bit Diffusion Models, 2024): `y = x W_q.T + (x A) B.T`, the rows `x A` being given.
"""

# M rows, K in_features, N out_features, R the rank

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import wide
from qpass.ops.library import define, specification
from qpass.ops.linear import WEIGHT, codes_shapes, real_shapes
from qpass.ops.packing import PackedLinear


def linear_real_low_rank(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, low: Tensor, up: Tensor
) -> Tensor:
    """`linear_real`, and `low @ up.T` before rounding: low `[..., R]`, up `[N, R]`."""
    return torch.ops.qpass.linear.real_low_rank(
        x, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features, low, up,
    )  # fmt: skip


def linear_codes_low_rank(
    codes: Tensor,
    scales: Tensor,
    packed: PackedLinear,
    bias: Tensor | None,
    dtype: torch.dtype,
    low: Tensor,
    up: Tensor,
) -> Tensor:
    """`linear_codes`, and `low @ up.T` before rounding: low `[..., R]`, up `[N, R]`."""
    return torch.ops.qpass.linear.codes_low_rank(
        codes, scales, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features, dtype, low, up,
    )  # fmt: skip


def check_low_rank(x: Tensor, n: int, low: Tensor, up: Tensor) -> None:
    """Raise `BadInput` unless a branch fits rows of `x` and `n` outputs."""
    if up.dim() != 2 or up.shape[0] != n:
        raise BadInput(f"up has shape {tuple(up.shape)}, expected {n} rows")
    if tuple(low.shape) != (*x.shape[:-1], up.shape[1]):
        raise BadInput(f"low has shape {tuple(low.shape)}, not one row of {up.shape[1]} each")
    if low.dtype != up.dtype or not low.is_floating_point():
        raise BadInput(f"low and up share a floating type, got {low.dtype} and {up.dtype}")


def _added(y: Tensor, low: Tensor, up: Tensor) -> Tensor:
    return y + low.to(y.dtype) @ up.to(y.dtype).T


def _real(
    x: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
    low: Tensor,
    up: Tensor,
) -> Tensor:
    check_low_rank(x, out_features, low, up)
    given = (weight, row_scales, group_scales, group_offsets, bias, bits, in_features, out_features)
    y = specification("linear.real")(x.to(wide(x.dtype)), *given)
    return _added(y, low, up).to(x.dtype)


def _codes(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    low: Tensor,
    up: Tensor,
) -> Tensor:
    check_low_rank(codes, out_features, low, up)
    given = (weight, row_scales, group_scales, group_offsets, bias, bits, in_features, out_features)
    y = specification("linear.codes")(codes, scales, *given, torch.float32)
    return _added(y, low, up).to(dtype)


define(
    f"linear.real_low_rank(Tensor x, {WEIGHT}, Tensor low, Tensor up) -> Tensor",
    _real,
    real_shapes,
)
define(
    f"linear.codes_low_rank(Tensor codes, Tensor scales, {WEIGHT}, ScalarType dtype, Tensor low,"
    " Tensor up) -> Tensor",
    _codes,
    codes_shapes,
)
