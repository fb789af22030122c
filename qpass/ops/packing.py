"""In which order the codes of a weight lie in memory: the one layout that all kernels read.

Rows (output channels) come in blocks of 16 and are padded with codes that are never used; each
group of columns is padded to whole lines. A line is 64 bytes: 16 rows of 4 bytes.
  8 bit: byte `4 n + j` holds row n, column `k + j`, for 4 columns from k.
  4 bit: byte `4 n + j` holds row n, column `k + j` in its low half and `k + 4 + j` in its high
         half, for 8 columns from k.
Stored values are unsigned: signed codes are raised by half the range (128 or 8), which is what
u8 x s8 dot products want; the kernels take the raise off again through the sum of the activations.
"""

# N rows, K columns, G groups, B blocks of 16 rows, L lines

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput

ROWS = 16
LINE = 64
# codes that are laid out together: the steps in between take several times their memory
SOME = 2**24
# longest group whose sums of products of two signed 8-bit codes surely fit int32
LONGEST_GROUP = 2**17


def columns_per_line(bits: int) -> int:
    """How many columns of one row a line holds."""
    if bits not in (4, 8):
        raise BadInput(f"weights are packed with 4 or 8 bits, got {bits}; pack wider codes as 8")
    return 4 * 8 // bits


def stored_zero(bits: int, signed: bool) -> int:
    """The stored value of code 0."""
    return 2 ** (bits - 1) if signed else 0


@final
@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A weight `row_scales[n] * (group_scales[n, g] * code[n, k] + group_offsets[n, g])`, packed.

    weight uint8 `[B, L, 64]`, row_scales float32 `[N]`, group_scales and group_offsets float16
    `[B, G, 16]` or None (then 1 and 0). 4-bit codes are unsigned exactly when there are offsets.
    """

    weight: Tensor
    row_scales: Tensor
    group_scales: Tensor | None
    group_offsets: Tensor | None
    bits: int
    in_features: int
    out_features: int


def pack_linear(
    codes: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None = None,
    group_offsets: Tensor | None = None,
    *,
    bits: int,
) -> PackedLinear:
    """Pack codes `[N, K]`, row_scales `[N]` and, where there are groups, `[N, G]` of each.

    Codes are int8, or uint8 for 4-bit codes with offsets.
    """
    n, k = codes.shape
    groups = 1 if group_scales is None else group_scales.shape[-1]
    if (codes.dtype is torch.uint8) != (bits == 4 and group_offsets is not None):
        raise BadInput(
            f"{codes.dtype} codes with bits={bits} and group_offsets={group_offsets is not None}; "
            "4-bit codes with offsets are uint8 in 0..15, all others are int8"
        )
    if group_offsets is not None and group_scales is None:
        raise BadInput("group_offsets without group_scales; pass scales of 1 with one group")
    if row_scales.shape != (n,):
        raise BadInput(f"{n} rows of codes but row_scales has shape {tuple(row_scales.shape)}")
    for name, values in (("group_scales", group_scales), ("group_offsets", group_offsets)):
        if values is not None and values.shape != (n, groups):
            raise BadInput(f"{name} has shape {tuple(values.shape)}, expected {(n, groups)}")
    return PackedLinear(
        weight=pack(codes, bits, groups),
        row_scales=row_scales.to(torch.float32).contiguous(),
        group_scales=None if group_scales is None else tile(group_scales),
        group_offsets=None if group_offsets is None else tile(group_offsets),
        bits=bits,
        in_features=k,
        out_features=n,
    )


def pack(codes: Tensor, bits: int, groups: int = 1) -> Tensor:
    """Lay out codes `[N, K]` (int8 for signed, uint8 for unsigned) as lines, uint8 `[B, L, 64]`."""
    n, k = codes.shape
    width = group_width(k, groups)
    if n * k > SOME and n > ROWS:
        return _filled(-(-n // ROWS), (pack(p, bits, groups) for p in codes.split(_some_rows(k))))
    step = columns_per_line(bits)
    raised = codes.to(torch.int16) + stored_zero(bits, codes.dtype is not torch.uint8)
    if codes.numel() and not 0 <= int(raised.min()) <= int(raised.max()) < 2**bits:
        raise BadInput(f"a code does not fit {bits} bits ({codes.dtype})")
    padded = torch.nn.functional.pad(
        raised.to(torch.uint8).reshape(n, groups, width), (0, -width % step, 0, 0, 0, -n % ROWS)
    )
    halves = padded.reshape(-1, ROWS, padded[0].numel() // step, step // 4, 4)
    bytes_ = halves[..., 0, :] if bits == 8 else halves[..., 0, :] | halves[..., 1, :] << 4
    return bytes_.transpose(1, 2).reshape(bytes_.shape[0], -1, LINE).contiguous()


def unpack(
    packed: Tensor, bits: int, shape: tuple[int, int], groups: int = 1, *, signed: bool = True
) -> Tensor:
    """The codes `[N, K]` that `pack` was given: int8 if signed, else uint8."""
    n, k = shape
    width = group_width(k, groups)
    if n * k > SOME and n > ROWS:
        rows = _some_rows(k)
        parts = (
            unpack(part, bits, (min(rows, n - at * rows), k), groups, signed=signed)
            for at, part in enumerate(packed.split(rows // ROWS))
        )
        return _filled(n, parts)
    step = columns_per_line(bits)
    bytes_ = packed.reshape(packed.shape[0], packed.shape[1], ROWS, 4).transpose(1, 2)
    halves = bytes_ if bits == 8 else torch.stack((bytes_ & 15, bytes_ >> 4), dim=-2)
    padded = halves.reshape(packed.shape[0] * ROWS, groups, width + -width % step)
    raised = padded[:n, :, :width].reshape(n, k)
    if not signed:
        return raised.contiguous()
    return (raised.to(torch.int16) - stored_zero(bits, signed)).to(torch.int8)


def _some_rows(k: int) -> int:
    """So many rows of `k` columns, in whole blocks, are laid out together."""
    return max(1, SOME // k // ROWS) * ROWS


def _filled(length: int, parts: Iterator[Tensor]) -> Tensor:
    """The parts one behind the other, where only one of them is in memory beside the whole."""
    first = next(parts)
    made = first.new_empty(length, *first.shape[1:])
    start = 0
    for part in itertools.chain((first,), parts):
        made[start : start + len(part)] = part
        start += len(part)
    return made


def group_width(k: int, groups: int) -> int:
    """How many columns a group has."""
    if groups < 1 or k < 1 or k % groups:
        raise BadInput(f"{k} columns do not divide into {groups} groups")
    if k // groups > LONGEST_GROUP:
        raise BadInput(f"a group of {k // groups} columns could overflow int32; use more groups")
    return k // groups


def tile(values: Tensor) -> Tensor:
    """One number per row and group, `[N, G]`, in the order of the lines: float16 `[B, G, 16]`."""
    n, groups = values.shape
    padded = torch.nn.functional.pad(values.to(torch.float16), (0, 0, 0, -n % ROWS))
    return padded.reshape(-1, ROWS, groups).transpose(1, 2).contiguous()


def untile(tiled: Tensor, n: int) -> Tensor:
    """The `[N, G]` numbers that `tile` was given, in float16."""
    return tiled.transpose(1, 2).reshape(-1, tiled.shape[1])[:n].contiguous()
