"""How the kernels read the words of packed weights: 4 bytes of one row, 4 or 8 columns.

A line of `qpass/ops/packing.py` is 16 words of int32, one for each row of a block.
"""

import triton
import triton.language as tl

from qpass._kernels.gpu.ptx import decode4, decode8, kinds

# 0x80808080, 0x08080808 and 0x0F0F0F0F as int32
_TOPS = tl.constexpr(-0x7F7F7F80)
_EIGHTS = tl.constexpr(0x08080808)
_LOWS = tl.constexpr(0x0F0F0F0F)


@triton.jit
def column(words, BITS: tl.constexpr, J: tl.constexpr, ZERO: tl.constexpr):
    """Column J of each word as float32, less ZERO.

    The stored value lands in the mantissa of a power of two whose last place it is: exact, and
    cheaper than a conversion from integer to float.
    """
    POSITION: tl.constexpr = 8 * (J % 4) + 4 * (J // 4)
    SHIFT: tl.constexpr = 0 if POSITION + BITS <= 23 else (12 if BITS == 4 else 16)
    AT: tl.constexpr = POSITION - SHIFT
    if SHIFT > 0:
        words = words >> SHIFT
    pattern = (words & ((2**BITS - 1) << AT)) | ((127 + 23 - AT) << 23)
    return pattern.to(tl.float32, bitcast=True) - (2 ** (23 - AT) + ZERO)


@triton.jit
def floats(words, BITS: tl.constexpr, ZERO: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """The values `[R, L * columns]` of words `[R, L]`, less ZERO, in `dtype`.

    PTX computes two values at a time; it is for 16-bit floats on NVIDIA hardware.
    """
    R: tl.constexpr = words.shape[0]
    L: tl.constexpr = words.shape[1]
    if BITS == 4 and PTX:
        asm: tl.constexpr = decode4(dtype, ZERO)
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            asm, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], kinds(dtype, 8), is_pure=True, pack=1
        )
    elif PTX:
        asm: tl.constexpr = decode8(dtype)
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            asm, "=h,=h,=h,=h,r", [words], kinds(dtype, 4), is_pure=True, pack=1
        )
    else:
        c0, c1 = column(words, BITS, 0, ZERO).to(dtype), column(words, BITS, 1, ZERO).to(dtype)
        c2, c3 = column(words, BITS, 2, ZERO).to(dtype), column(words, BITS, 3, ZERO).to(dtype)
        if BITS == 4:
            c4, c5 = column(words, 4, 4, ZERO).to(dtype), column(words, 4, 5, ZERO).to(dtype)
            c6, c7 = column(words, 4, 6, ZERO).to(dtype), column(words, 4, 7, ZERO).to(dtype)
    if BITS == 4:
        even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
        odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    else:
        even = tl.join(c0, c2)
        odd = tl.join(c1, c3)
    return tl.reshape(tl.join(even, odd), (R, L * (32 // BITS)))


@triton.jit
def codes(words, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """The codes `[R, L * columns]` of words `[R, L]`, int8."""
    R: tl.constexpr = words.shape[0]
    L: tl.constexpr = words.shape[1]
    if BITS == 8:
        words = words ^ _TOPS
        even = tl.join(words, words >> 16)
    else:
        low = words & _LOWS
        high = (words >> 4) & _LOWS
        if SIGNED:
            # byte by byte: less 8, and no byte borrows from the next
            low = ((low | _TOPS) - _EIGHTS) ^ _TOPS
            high = ((high | _TOPS) - _EIGHTS) ^ _TOPS
        even = tl.join(tl.join(low, high), tl.join(low >> 16, high >> 16))
    return tl.reshape(tl.join(even, even >> 8).to(tl.int8), (R, L * (32 // BITS)))


@triton.jit
def row_offsets(rows, lines):
    """Where the first word of each row lies, counted in words, when a block has `lines` lines."""
    return (rows // 16).to(tl.int64) * lines * 16 + rows % 16


@triton.jit
def along(values, SWAP: tl.constexpr):
    """One value for each output, to multiply a tile `[rows of x, outputs]` or its transpose."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def across(values, SWAP: tl.constexpr):
    """One value for each row of x, to multiply a tile `[rows of x, outputs]` or its transpose."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def tile_ids(m, n, BM: tl.constexpr, BN: tl.constexpr):
    """Which tile a program computes: bands of 8 tiles of x, so that weights stay in the cache."""
    BAND: tl.constexpr = 8
    tiles_m = tl.cdiv(m, BM)
    tiles_n = tl.cdiv(n, BN)
    band = tl.program_id(0) // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    inside = tl.program_id(0) % (BAND * tiles_n)
    return band * BAND + inside % height, inside // height
