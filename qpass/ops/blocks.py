"""Products of 4-bit floats in blocks, MXFP4 and NVFP4: what hardware for them multiplies.

Codes are E2M1, two to a byte, the first in the low half. The scales of blocks are bytes, row by
row: the bits of E8M0 or of E4M3 numbers. A float32 factor stands over each row.
"""

# M rows, N rows of a weight, K columns, G blocks of a row

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import FORMATS, SCALES, ScaleFormat
from qpass.ops.bits import from_bits, row_bytes, to_bits
from qpass.ops.fake_quantize import rounded_blocks
from qpass.ops.hadamard import transformed
from qpass.ops.library import define
from qpass.ops.quantize import SMALLEST_ROW

FORMAT = "e2m1"
BITS = 4
SCALED_BY = ("e8m0", "e4m3")


@final
@dataclass(frozen=True, slots=True, eq=False)
class BlocksLinear:
    """A weight `row_scales[n] * scales[n, g] * codes[n, k]` of 4-bit floats in blocks.

    weight uint8 `[N, K / 2]`, scales uint8 `[N, G]`, row_scales float32 `[N]`; `scale_format` says
    what number a scale is.
    """

    weight: Tensor
    scales: Tensor
    row_scales: Tensor
    scale_format: str

    @property
    def in_features(self) -> int:
        return 2 * self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def block(self) -> int:
        """How many columns share a scale."""
        return self.in_features // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]`, evaluated in `dtype`, float32 or float64."""
        values = _numbers(self.weight, self.scales, self.scale_format, dtype)
        return values * self.row_scales.to(dtype).unsqueeze(1)


def quantize_blocks(
    x: Tensor,
    block: int,
    scale_format: str,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[..., K / 2]`, scales uint8 `[..., K / block]`, row scales `[..., 1]`.

    The numbers that they stand for are those of `fake_quantize` for E2M1 in dynamic blocks, in
    float32. Row scales of E8M0 blocks are 1. `signs`, `factor` and `power` are those of `hadamard`,
    applied first, in float32. A row with a NaN or an infinity gets codes of 0 and the row scale
    NaN, so that everything computed from it is NaN.
    """
    return torch.ops.qpass.quantize_blocks.default(x, block, scale_format, signs, factor, power)


def linear_blocks(
    codes: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    held: BlocksLinear,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`x @ W.T + bias` in `dtype`, for x as `quantize_blocks` gives it and W alike, in float32.

    It is `row_scales * W.row_scales * sum_g(scales * W.scales * sum(codes * W.codes))`.
    """
    return torch.ops.qpass.linear.blocks(
        codes, scales, row_scales, held.weight, held.scales, held.row_scales, bias,
        held.scale_format, dtype,
    )  # fmt: skip


def pack_blocks(
    codes_nk: Tensor, scales_ng: Tensor, row_scales: Tensor, scale_format: str
) -> BlocksLinear:
    """Pack E2M1 codes, one to a byte, and scales in the type that stores them."""
    scales = scales_ng.to(_scale_format(scale_format).dtype).view(torch.uint8)
    return BlocksLinear(to_bits(codes_nk, BITS), scales, row_scales, scale_format)


def _scale_format(name: str) -> ScaleFormat:
    if name not in SCALED_BY:
        raise BadInput(f"blocks of 4-bit floats are scaled by {SCALED_BY}, not {name!r}")
    return SCALES[name]


def _numbers(codes: Tensor, scales: Tensor, scale_format: str, dtype: torch.dtype) -> Tensor:
    """Codes `[M, K / 2]` times scales `[M, G]`."""
    m, k = codes.shape[0], 2 * codes.shape[1]
    values = FORMATS[FORMAT].decode(from_bits(codes, BITS, k, torch.uint8)).to(dtype)
    numbers = scales.view(_scale_format(scale_format).dtype).to(dtype)
    return (
        values.reshape(m, scales.shape[1], k // scales.shape[1]) * numbers.unsqueeze(2)
    ).reshape(m, k)


def _quantize(
    x: Tensor,
    block: int,
    scale_format: str,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    scales, points = _scale_format(scale_format), FORMATS[FORMAT]
    k = _check_width(x, block)
    if (signs is None) != (factor is None):
        raise BadInput("a transform needs both signs and factor; pass both or neither")
    y = x.to(torch.float32)
    if signs is not None and factor is not None:
        y = transformed(y, signs.float(), factor.float(), power)
    m = math.prod(x.shape[:-1])
    y = y.reshape(m, k)
    largest = y.abs().amax(-1, keepdim=True) if k else y.new_zeros((m, 1))
    finite = largest.isfinite()
    y = torch.where(finite & (largest >= SMALLEST_ROW), y, 0.0)
    rows = torch.ones_like(largest)
    if scales.needs_factor and k:
        rows = y.abs().amax(-1, keepdim=True) / (points.high * scales.top)
        rows = torch.where(rows > 0, rows, 1.0)
        y = y / rows
    blocks_mgl = y.reshape(m, k // block, block)
    if blocks_mgl.numel():
        nearest, scale_mg1 = rounded_blocks(blocks_mgl, points, scales)
        codes, stored = points.encode(nearest).reshape(m, k), scale_mg1.squeeze(2)
    else:
        codes, stored = blocks_mgl.reshape(m, k).to(torch.uint8), blocks_mgl.sum(2)
    lead = x.shape[:-1]
    return (
        to_bits(codes, BITS).reshape(*lead, k // 2),
        stored.to(scales.dtype).view(torch.uint8).reshape(*lead, k // block),
        torch.where(finite, rows, torch.nan).reshape(*lead, 1),
    )


def _check_width(x: Tensor, block: int) -> int:
    if block < 2 or block % 2:
        raise BadInput(f"a block is an even number of columns, got {block}")
    if x.dim() < 1 or x.shape[-1] % block:
        raise BadInput(f"rows of shape {tuple(x.shape)} do not divide into blocks of {block}")
    return x.shape[-1]


def _quantize_shapes(
    x: Tensor,
    block: int,
    scale_format: str,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    lead, k = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*lead, k // 2), dtype=torch.uint8),
        x.new_empty((*lead, k // block), dtype=torch.uint8),
        x.new_empty((*lead, 1), dtype=torch.float32),
    )


def check_blocks(
    codes: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    weight_row_scales: Tensor,
    bias: Tensor | None,
    scale_format: str,
) -> None:
    """Raise `BadInput` unless the tensors of activations and of a weight fit together."""
    _scale_format(scale_format)
    if weight.dim() != 2 or weight_scales.dim() != 2 or codes.dim() < 1:
        raise BadInput("codes of a weight and their scales are matrices")
    (n, half), groups, lead = weight.shape, weight_scales.shape[1], codes.shape[:-1]
    if groups == 0 or half % groups or row_bytes(2 * half, BITS) != half:
        raise BadInput(f"{2 * half} columns do not divide into {groups} blocks of even width")
    expected = (
        ("codes", codes, (*lead, half)),
        ("scales", scales, (*lead, groups)),
        ("row_scales", row_scales, (*lead, 1)),
        ("weight_scales", weight_scales, (n, groups)),
        ("weight_row_scales", weight_row_scales, (n,)),
        ("bias", bias, (n,)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInput(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    for name, tensor in (
        ("codes", codes), ("scales", scales), ("weight", weight), ("weight_scales", weight_scales)
    ):  # fmt: skip
        if tensor.dtype is not torch.uint8:
            raise BadInput(f"{name} is {tensor.dtype}, expected the bytes of codes or scales")


def _linear(
    codes: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    weight_row_scales: Tensor,
    bias: Tensor | None,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    check_blocks(
        codes, scales, row_scales, weight, weight_scales, weight_row_scales, bias, scale_format
    )
    lead, n = codes.shape[:-1], weight.shape[0]
    m = math.prod(lead)
    x = _numbers(
        codes.reshape(m, codes.shape[-1]),
        scales.reshape(m, scales.shape[-1]),
        scale_format,
        torch.float32,
    )
    y = x @ _numbers(weight, weight_scales, scale_format, torch.float32).T
    y = y * weight_row_scales.float() * row_scales.reshape(m, 1)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype).reshape(*lead, n)


def _linear_shapes(
    codes: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    weight_row_scales: Tensor,
    bias: Tensor | None,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


define(
    "quantize_blocks(Tensor x, int block, str scale_format, Tensor? signs=None,"
    " Tensor? factor=None, int power=1) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_shapes,
)
define(
    "linear.blocks(Tensor codes, Tensor scales, Tensor row_scales, Tensor weight,"
    " Tensor weight_scales, Tensor weight_row_scales, Tensor? bias, str scale_format,"
    " ScalarType dtype) -> Tensor",
    _linear,
    _linear_shapes,
)
