"""Products of activations and weights that are both integers of 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.ops.library import define, specification
from qpass.ops.linear import WEIGHT, codes_shapes
from qpass.ops.packing import PackedLinear


def linear_fours(
    codes: Tensor, scales: Tensor, packed: PackedLinear, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`linear_codes`, for codes of -8 .. 7: what it computes of others is undefined."""
    return torch.ops.qpass.linear_fours.default(
        codes, scales, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features, dtype,
    )  # fmt: skip


define(
    f"linear_fours(Tensor codes, Tensor scales, {WEIGHT}, ScalarType dtype) -> Tensor",
    specification("linear.codes"),
    codes_shapes,
)
