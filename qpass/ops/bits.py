"""How codes of a few bits lie in a checkpoint: one behind the other, each row from a new byte."""

# N rows, K codes of a row

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput

# as many codes as a byte has bits fill as many bytes as a code has bits
CODES = 8


def to_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` of one byte each as uint8 `[N, ceil(K * bits / 8)]`.

    Code `k` takes the bits from `k * bits` on, the lowest of a byte first; signed codes are stored
    in two's complement. Of 8 bits, the codes are returned as they are.
    """
    _check(bits)
    n, k = codes.shape
    if bits == CODES:
        return codes
    few = codes.view(torch.uint8) & (2**bits - 1)
    few = torch.nn.functional.pad(few, (0, -k % CODES)).reshape(n, -(-k // CODES), CODES)
    word = few.new_zeros(few.shape[:2], dtype=torch.int64)
    for i in range(CODES):
        word |= few[:, :, i].to(torch.int64) << bits * i
    found = torch.stack([(word >> 8 * i) & 255 for i in range(bits)], dim=-1)
    return found.to(torch.uint8).flatten(1)[:, : row_bytes(k, bits)].contiguous()


def from_bits(packed: Tensor, bits: int, k: int, dtype: torch.dtype) -> Tensor:
    """The codes `[N, k]` of `dtype`, int8 or uint8, that `to_bits` was given."""
    _check(bits)
    if bits == CODES:
        return packed
    n, given = packed.shape
    if given != (wanted := row_bytes(k, bits)):
        raise BadInput(f"{k} codes of {bits} bits are {wanted} bytes a row, not {given}")
    whole = torch.nn.functional.pad(packed, (0, -given % bits)).reshape(n, -(-given // bits), bits)
    word = whole.new_zeros(whole.shape[:2], dtype=torch.int64)
    for i in range(bits):
        word |= whole[:, :, i].to(torch.int64) << 8 * i
    few = torch.stack([(word >> bits * i) & (2**bits - 1) for i in range(CODES)], dim=-1)
    codes = few.to(torch.uint8).flatten(1)[:, :k]
    if dtype is torch.uint8:
        return codes.contiguous()
    # moving the sign bit to the top and shifting back extends it
    return (codes << 8 - bits).view(torch.int8) >> 8 - bits


def row_bytes(k: int, bits: int) -> int:
    """How many bytes a row of `k` codes takes."""
    return -(-k * bits // 8)


def _check(bits: int) -> None:
    if not 1 <= bits <= CODES:
        raise BadInput(f"a code has 1 to {CODES} bits, got {bits}")
