"""Products of activations and weights that are both integers of 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.library import define, specification
from qpass.ops.packing import PackedLinear


def linear_fours(
    codes: Tensor, scales: Tensor, packed: PackedLinear, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_codes`, for codes of -8 .. 7: what it computes of others is undefined."""
    return torch.ops.qpass.linear_fours.default(
        codes, scales, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features, dtype,
    )  # fmt: skip


def _specification(
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
) -> Tensor:
    held = (weight, row_scales, group_scales, group_offsets, bias)
    product = specification("linear.codes")
    return product(codes, scales, *held, bits, in_features, out_features, dtype)


def _shapes(
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
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)


define(
    "linear_fours(Tensor codes, Tensor scales, Tensor weight, Tensor row_scales,"
    " Tensor? group_scales, Tensor? group_offsets, Tensor? bias, int bits, int in_features,"
    " int out_features, ScalarType dtype) -> Tensor",
    _specification,
    _shapes,
)
