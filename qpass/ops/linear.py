"""What a quantized linear layer computes, with integer and with float activations."""

# K in_features, N out_features, G groups, B blocks of 16 rows

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import wide
from qpass.ops.library import define
from qpass.ops.packing import ROWS, PackedLinear, columns_per_line, group_width, unpack, untile

# integers up to here survive any order of summation in float32
EXACT_FLOAT32 = 2**24


def linear_codes(
    codes: Tensor, scales: Tensor, packed: PackedLinear, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(codes * scales) @ W.T + bias` in `dtype`, for codes int8 `[..., K]`, scales `[..., 1]`.

    The sums of integers inside a group are exact, everything outside is float32:
    `scales * row_scales * sum_g(group_scales * sum(codes * q) + group_offsets * sum(codes))`.
    """
    return torch.ops.qpass.linear.codes(
        codes, scales, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features, dtype,
    )  # fmt: skip


def linear_real(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` in the dtype of `x [..., K]`, computed in float32 (float64 for float64)."""
    return torch.ops.qpass.linear.real(
        x, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features,
    )  # fmt: skip


def _groups(group_scales: Tensor | None) -> int:
    return 1 if group_scales is None else group_scales.shape[1]


def check_linear(
    features: int,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    k: int,
    n: int,
) -> None:
    """Raise `BadInput` unless an input of `features` and the tensors of a weight fit together."""
    groups = _groups(group_scales)
    width, step = group_width(k, groups), columns_per_line(bits)
    blocks = -(-n // ROWS)
    expected = (
        ("weight", weight, (blocks, groups * -(-width // step), 64)),
        ("row_scales", row_scales, (n,)),
        ("group_scales", group_scales, (blocks, groups, ROWS)),
        ("group_offsets", group_offsets, (blocks, groups, ROWS)),
        ("bias", bias, (n,)),
    )
    if features != k:
        raise BadInput(f"the input has {features} features, the weight {k}")
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInput(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


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
) -> Tensor:
    check_linear(codes.shape[-1], weight, row_scales, group_scales, group_offsets, bias, bits,
                 in_features, out_features)  # fmt: skip
    groups = _groups(group_scales)
    signed = bits == 8 or group_offsets is None
    q = unpack(weight, bits, (out_features, in_features), groups, signed=signed)
    width = in_features // groups
    # sums of integers are exact in a float type that can hold the largest, and use its fast matmul
    fits = width * 127 * 2 ** (bits - signed) < EXACT_FLOAT32
    exact = torch.float32 if fits else torch.float64
    x = codes.reshape(-1, groups, width)
    w = q.reshape(out_features, groups, width)
    s = None if group_scales is None else untile(group_scales, out_features).to(torch.float32)
    m = None if group_offsets is None else untile(group_offsets, out_features).to(torch.float32)
    total = scales.new_zeros((x.shape[0], out_features), dtype=torch.float32)
    for g in range(groups):
        x_g = x[:, g].to(exact)
        products = (x_g @ w[:, g].to(exact).T).to(torch.float32)
        total += products if s is None else products * s[:, g]
        if m is not None:
            total += x_g.sum(-1, keepdim=True).to(torch.float32) * m[:, g]
    y = total * row_scales * scales.reshape(-1, 1)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(dtype).reshape(*codes.shape[:-1], out_features)


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
) -> Tensor:
    check_linear(x.shape[-1], weight, row_scales, group_scales, group_offsets, bias, bits,
                 in_features, out_features)  # fmt: skip
    dtype = wide(x.dtype)
    groups = _groups(group_scales)
    signed = bits == 8 or group_offsets is None
    q = unpack(weight, bits, (out_features, in_features), groups, signed=signed).to(dtype)
    w = q.reshape(out_features, groups, -1)
    if group_scales is not None:
        w = w * untile(group_scales, out_features).to(dtype)[..., None]
    if group_offsets is not None:
        w = w + untile(group_offsets, out_features).to(dtype)[..., None]
    w = w.reshape(out_features, in_features) * row_scales.to(dtype)[:, None]
    y = torch.nn.functional.linear(x.to(dtype), w, None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


def codes_shapes(
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
    *_: Tensor,
) -> Tensor:
    """The results of `linear.codes`, and of operators that take more behind its arguments."""
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)


def real_shapes(
    x: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
    *_: Tensor,
) -> Tensor:
    """The results of `linear.real`, and of operators that take more behind its arguments."""
    return x.new_empty((*x.shape[:-1], out_features))


WEIGHT = (
    "Tensor weight, Tensor row_scales, Tensor? group_scales, Tensor? group_offsets, Tensor? bias,"
    " int bits, int in_features, int out_features"
)

define(
    f"linear.codes(Tensor codes, Tensor scales, {WEIGHT}, ScalarType dtype) -> Tensor",
    _codes,
    codes_shapes,
)
define(f"linear.real(Tensor x, {WEIGHT}) -> Tensor", _real, real_shapes)
