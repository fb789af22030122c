"""What holds a weight's codes while products read them: integers that kernels know, or a table.

Kernels read integers of 4 or 8 bits with float16 scales of groups. Narrower integers are such
integers; so are the points of a small float format, counted in its smallest point. Scales that are
8-bit floats are float16 numbers, up to a power of two for each row. Everything else is read from a
table of points, by the reference operator.
"""

# N rows, K columns, G groups of a row

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qpass.formats import Format, Integers, QuantizedTensor, QuantSpec
from qpass.ops import (
    BlocksLinear,
    PackedLinear,
    PointsLinear,
    integer_rows,
    pack_blocks,
    pack_linear,
)
from qpass.ops.bits import from_bits
from qpass.ops.blocks import BITS, FORMAT
from qpass.ops.packing import unpack, untile
from qpass.ops.points import TABLE

Held = PackedLinear | PointsLinear | BlocksLinear
# what notes call the operators that are defined in plain PyTorch and have no kernels yet
REFERENCE = "on the reference path, without kernels"
NARROW = 4
WIDE = 8
# blocks of 4-bit floats that hardware multiplies, by the format of their scales
HARDWARE_BLOCKS = {"e8m0": 32, "e4m3": 16}
# the largest power of two that float16 holds
LARGEST_POWER = 2.0**15
# the smallest factor of a row: numbers around it are normal in float32
SMALLEST_FACTOR = 2.0**-120


def container_bits(spec: QuantSpec) -> int | None:
    """How many bits the integers have that hold weights of `spec`; None: a table serves them."""
    codes = spec.codes
    if spec.grouped and spec.scale_format not in ("float16", "e4m3", "e8m0"):
        return None
    if isinstance(codes, Integers):
        return NARROW if codes.bits <= NARROW else WIDE if codes.bits <= WIDE else None
    counts = [magnitude / _unit(codes) for magnitude in codes.magnitudes]
    whole = all(count == int(count) for count in counts) and counts[0] < 2 ** (WIDE - 1)
    return WIDE if whole else None


def as_lines(spec: QuantSpec) -> bool:
    """Whether kernels read weights of `spec` as integers of its own bits, scales included."""
    kept = spec.scale_format == "float16" or not spec.grouped
    whole = isinstance(spec.codes, Integers) and spec.codes.bits == container_bits(spec)
    return whole and kept and not spec.one_factor


def by_reference(weight: QuantSpec, activation: QuantSpec | None) -> bool:
    """Whether a product runs on operators that have no kernels."""
    if activation is not None and not integer_rows(activation):
        return True
    return container_bits(weight) is None


def in_blocks(weight: QuantSpec, activation: QuantSpec | None) -> bool:
    """Whether both are the 4-bit floats, in blocks alike, that GPUs multiply as they are."""
    if activation is None or activation.format != FORMAT or weight.format != FORMAT:
        return False
    alike = (weight.block, weight.scale_format) == (activation.block, activation.scale_format)
    plain = activation.dynamic and activation.clip == 1
    return alike and plain and weight.block == HARDWARE_BLOCKS.get(weight.scale_format)


def unreadable(activation: QuantSpec | None) -> str | None:
    """Why no operator makes such activations, or None."""
    if activation is None:
        return None
    if activation.axis != -1:
        return "activations are quantized along their last axis"
    if activation.static:
        return None if activation.scale else "the scale of its input is not known: calibrate"
    if activation.dynamic and activation.block != "tensor":
        return None
    return "activations are quantized when the model runs per token or in blocks, or per tensor"


def stored_as(spec: QuantSpec, width: int) -> QuantSpec:
    """The spec of the rows of a weight `[N, width]`, one for all that are stored alike."""
    block = spec.block
    alone = block == width and not spec.tensor_scale
    if block == "tensor" or (alone and (not spec.symmetric or spec.scale_format != "float32")):
        block = "channel"
    return dataclasses.replace(spec, block=block, axis=-1)


def hold(tensor: QuantizedTensor, *, blocks: bool = False) -> Held:
    """The weight as an operator takes it; `blocks`: as the one that multiplies 4-bit floats."""
    spec = tensor.spec
    bits = container_bits(spec)
    scales, offsets = tensor.group_scales_ng, tensor.group_offsets_ng
    if blocks:
        assert scales is not None
        return pack_blocks(tensor.codes_nk, scales, tensor.row_scales_n, spec.scale_format)
    if bits is None:
        return PointsLinear(
            tensor.codes_nk,
            _table(spec.codes).to(tensor.codes_nk.device),
            tensor.row_scales_n,
            None if scales is None else scales.float(),
            None if offsets is None else offsets.float(),
        )
    codes, rows = tensor.codes_nk, tensor.row_scales_n
    if not isinstance(spec.codes, Integers):
        unit = _unit(spec.codes)
        codes = (spec.codes.decode(codes) / unit).to(torch.int8)
        rows = rows * unit
    if scales is not None and spec.scale_format == "e8m0":
        codes, rows, scales = _in_float16(codes, rows, scales.float())
    elif scales is not None:
        scales = scales.half()
    return pack_linear(codes, rows, scales, offsets, bits=bits)


def release(held: Held, spec: QuantSpec) -> QuantizedTensor:
    """The tensor that was held.

    Only blocks that are nothing beside others of their row, by a factor of 2^38, are zeros now.
    """
    if isinstance(held, PointsLinear):
        scales, offsets = held.group_scales, held.group_offsets
        return QuantizedTensor(
            spec,
            held.weight,
            held.row_scales,
            None if scales is None else scales.to(spec.scale_dtype),
            None if offsets is None else offsets.to(spec.scale_dtype),
        )
    n, k = held.out_features, held.in_features
    if isinstance(held, BlocksLinear):
        codes = from_bits(held.weight, BITS, k, spec.codes.code_dtype)
        return QuantizedTensor(spec, codes, held.row_scales, held.scales.view(spec.scale_dtype))
    groups = 1 if held.group_scales is None else held.group_scales.shape[1]
    signed = held.bits == WIDE or held.group_offsets is None
    codes = unpack(held.weight, held.bits, (n, k), groups, signed=signed)
    rows = held.row_scales
    scales = None if held.group_scales is None else untile(held.group_scales, n)
    offsets = None if held.group_offsets is None else untile(held.group_offsets, n)
    if not isinstance(spec.codes, Integers):
        unit = _unit(spec.codes)
        codes = spec.codes.encode(codes.float() * unit)
        rows = rows / unit
    if scales is not None and spec.scale_format == "e8m0":
        scales = spec.scales.stored(scales.float() * rows.unsqueeze(1))
        rows = torch.ones_like(rows)
    if scales is not None:
        scales = scales.to(spec.scale_dtype)
    return QuantizedTensor(spec, codes, rows, scales, offsets)


def row_sums(tensor: QuantizedTensor) -> Tensor:
    """What each row of a weight sums to, float32 `[N]`: what offsets of the input multiply."""
    return tensor.dequantize(torch.float64).sum(1).float()


def _in_float16(
    codes_nk: Tensor, rows_n: Tensor, scales_ng: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales that are powers of two as float16, and the power that each row gives for that."""
    n, groups = scales_ng.shape
    used_ng = (codes_nk.reshape(n, groups, -1) != 0).any(2)
    largest_n = torch.where(used_ng, scales_ng, 0.0).amax(1)
    power_n = torch.where(largest_n > 0, largest_n / LARGEST_POWER, 1.0)
    power_n = power_n.clamp(min=SMALLEST_FACTOR)
    # smaller powers, of blocks that nobody sees beside the largest, are zeros
    scales = torch.where(used_ng, scales_ng / power_n.unsqueeze(1), 0.0).half()
    lost_ng = scales == 0
    codes = codes_nk.reshape(n, groups, -1).masked_fill(lost_ng.unsqueeze(2), 0)
    return codes.reshape(codes_nk.shape), rows_n * power_n, scales


def _unit(codes: Format) -> float:
    """The smallest point, a power of two."""
    return codes.magnitudes[-1]


def _table(codes: Format) -> Tensor:
    """The points of a format by the bits of their codes."""
    every = codes.codes()
    table = torch.zeros(TABLE, dtype=torch.float32, device="cpu")
    return table.index_put((every.view(torch.uint8).long(),), codes.decode(every))
