"""Which tensors of a checkpoint are a quantized weight, and what they look like.

Codes row by row serve every format. Weights that kernels read as integers of their own bits are
stored as they are in memory, in lines (`qpass/ops/packing.py`): loading one maps it from the file.
"""

# N rows, K columns, G groups of a row

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.ops import PackedLinear, from_bits, row_bytes, to_bits
from qpass.ops.packing import LINE, ROWS, columns_per_line, group_width

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
# what the codes of a weight in lines are called
LINES = "lines"


def shapes(spec: QuantSpec, n: int, k: int) -> Shapes:
    """The shape and type of each tensor of a weight `[n, k]`.

    Codes of less than 8 bits lie one behind the other in a row. A factor that all rows share is one
    number, and scales of 8 bits are bytes: their bit patterns.
    """
    codes = spec.codes
    packed = codes.bits < 8
    found: Shapes = {
        "codes": ((n, row_bytes(k, codes.bits)), torch.uint8 if packed else codes.code_dtype),
        "row_scales": ((min(n, 1) if spec.one_factor else n,), torch.float32),
    }
    if spec.grouped:
        kind = torch.uint8 if spec.scales.bits == 8 else spec.scale_dtype
        found["group_scales"] = ((n, spec.groups(k)), kind)
        if not spec.symmetric:
            found["group_offsets"] = ((n, spec.groups(k)), kind)
    return found


def to_tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a weight, by name."""
    spec = weight.spec
    rows = weight.row_scales_n
    found = {
        "codes": to_bits(weight.codes_nk, spec.codes.bits),
        "row_scales": rows[:1] if spec.one_factor else rows,
    }
    groups = {"group_scales": weight.group_scales_ng, "group_offsets": weight.group_offsets_ng}
    for name, values in groups.items():
        if values is not None:
            found[name] = values.view(torch.uint8) if spec.scales.bits == 8 else values
    return found


def from_tensors(spec: QuantSpec, k: int, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    """The weight `[n, k]` of copies of tensors that have the shapes and types of its spec."""
    codes = from_bits(tensors["codes"], spec.codes.bits, k, spec.codes.code_dtype)
    if codes is tensors["codes"]:
        codes = codes.clone()
    rows = tensors["row_scales"]
    rows = rows.expand(len(codes)).clone()
    groups = [tensors.get(name) for name in ("group_scales", "group_offsets")]
    scales, offsets = (None if values is None else values.clone() for values in groups)
    if scales is not None and scales.dtype is torch.uint8:
        scales = scales.view(spec.scale_dtype)
    return QuantizedTensor(spec, codes, rows, scales, offsets)


def line_shapes(spec: QuantSpec, n: int, k: int) -> Shapes:
    """The shape and type of each tensor of a weight `[n, k]` in lines."""
    blocks, groups = -(-n // ROWS), spec.groups(k) if spec.grouped else 1
    lines = groups * -(-group_width(k, groups) // columns_per_line(spec.codes.bits))
    found: Shapes = {
        LINES: ((blocks, lines, LINE), torch.uint8),
        "row_scales": ((n,), torch.float32),
    }
    if spec.grouped:
        found["group_scales"] = ((blocks, groups, ROWS), torch.float16)
        if not spec.symmetric:
            found["group_offsets"] = found["group_scales"]
    return found


def to_lines(weight: PackedLinear) -> dict[str, Tensor]:
    """The tensors of a weight in lines, by name: those that it has."""
    found = {LINES: weight.weight, "row_scales": weight.row_scales}
    groups = {"group_scales": weight.group_scales, "group_offsets": weight.group_offsets}
    return {**found, **{name: values for name, values in groups.items() if values is not None}}


def from_lines(spec: QuantSpec, n: int, k: int, tensors: Mapping[str, Tensor]) -> PackedLinear:
    """The weight `[n, k]` that has these very tensors, of the shapes and types of its spec."""
    scales, offsets = tensors.get("group_scales"), tensors.get("group_offsets")
    parts = (tensors[LINES], tensors["row_scales"], scales, offsets)
    return PackedLinear(*parts, spec.codes.bits, k, n)
