"""What a linear layer computes whose codes name numbers in a table: the reference of any format.

No kernel implements it: the weight becomes floats at each call. It serves the formats that no
container of integers holds, and says what they mean.
"""

# K in_features, N out_features, G groups

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import wide
from qpass.ops.library import define
from qpass.ops.packing import group_width

TABLE = 256


@final
@dataclass(frozen=True, slots=True, eq=False)
class PointsLinear:
    """A weight `row_scales[n] * (group_scales[n, g] * points[code[n, k]] + group_offsets[n, g])`.

    codes uint8 or int8 `[N, K]`, points float32 `[256]` by the bits of a code, row_scales float32
    `[N]`, group_scales and group_offsets float32 `[N, G]` or None (then 1 and 0).
    """

    weight: Tensor
    points: Tensor
    row_scales: Tensor
    group_scales: Tensor | None
    group_offsets: Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]`, evaluated in `dtype`, float32 or float64."""
        n, k = self.weight.shape
        patterns = self.weight.view(torch.uint8).to(torch.int32)
        values = self.points.to(dtype).index_select(0, patterns.flatten())
        if self.group_scales is not None:
            groups = self.group_scales.shape[1]
            values = values.view(n, groups, group_width(k, groups))
            values = values * self.group_scales.to(dtype).unsqueeze(2)
            if self.group_offsets is not None:
                values = values + self.group_offsets.to(dtype).unsqueeze(2)
        return values.reshape(n, k) * self.row_scales.to(dtype).unsqueeze(1)


def linear_points(x: Tensor, held: PointsLinear, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` in the dtype of `x [..., K]`, computed in float32 (float64 for float64)."""
    return torch.ops.qpass.linear.points(
        x, held.weight, held.points, held.row_scales, held.group_scales, held.group_offsets, bias
    )


def _specification(
    x: Tensor,
    weight: Tensor,
    points: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    held = PointsLinear(weight, points, row_scales, group_scales, group_offsets)
    _check(x.shape[-1], held, bias)
    dtype = wide(x.dtype)
    y = torch.nn.functional.linear(
        x.to(dtype), held.dequantize(dtype), None if bias is None else bias.to(dtype)
    )
    return y.to(x.dtype)


def _check(features: int, held: PointsLinear, bias: Tensor | None) -> None:
    n, k = held.weight.shape
    if features != k:
        raise BadInput(f"the input has {features} features, the weight {k}")
    scales = held.group_scales
    groups = (n, 0 if scales is None else scales.shape[-1])
    expected = (
        ("points", held.points, (TABLE,)),
        ("row_scales", held.row_scales, (n,)),
        ("group_scales", scales, groups),
        ("group_offsets", held.group_offsets, groups),
        ("bias", bias, (n,)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInput(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def _shapes(
    x: Tensor,
    weight: Tensor,
    points: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "linear.points(Tensor x, Tensor weight, Tensor points, Tensor row_scales,"
    " Tensor? group_scales, Tensor? group_offsets, Tensor? bias) -> Tensor",
    _specification,
    _shapes,
)
