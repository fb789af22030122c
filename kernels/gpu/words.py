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
def column(words, BITS: tl.constexpr, J: tl.constexpr, ZERO: tl.constexpr, nought=0):
    """Column J of each word as float32, less ZERO.

    The stored value lands in the mantissa of a power of two whose last place it is: exact, and
    cheaper than a conversion from integer to float. A `nought` that the compiler does not know to
    be 0 keeps it from writing the powers into every instruction, where they do not fit beside a
    mask.
    """
    POSITION: tl.constexpr = 8 * (J % 4) + 4 * (J // 4)
    SHIFT: tl.constexpr = 0 if POSITION + BITS <= 23 else (12 if BITS == 4 else 16)
    AT: tl.constexpr = POSITION - SHIFT
    if SHIFT > 0:
        words = words >> SHIFT
    power = nought + ((127 + 23 - AT) << 23)
    pattern = (words & ((2**BITS - 1) << AT)) | power
    return pattern.to(tl.float32, bitcast=True) - (2 ** (23 - AT) + ZERO)


@triton.jit
def _pair(a, b):
    """`[R, 2 L]` from `[R, L]` each, in turns."""
    R: tl.constexpr = a.shape[0]
    L: tl.constexpr = a.shape[1]
    return tl.reshape(tl.join(a, b), (R, 2 * L))


@triton.jit
def pairs4(words, ZERO: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Columns 0-1, 2-3, 4-5 and 6-7 of words `[R, L]` of 4-bit codes, less ZERO: `[R, 2 L]` each.

    A thread that holds a word holds two neighbours of each result, which is how products on tensor
    cores want them: nothing moves between threads. PTX computes two values at a time; it is for
    16-bit floats on NVIDIA hardware.
    """
    if PTX:
        asm: tl.constexpr = decode4(dtype, ZERO)
        c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
            asm, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], kinds(dtype, 8), is_pure=True, pack=1
        )
    else:
        c0, c1 = column(words, 4, 0, ZERO).to(dtype), column(words, 4, 1, ZERO).to(dtype)
        c2, c3 = column(words, 4, 2, ZERO).to(dtype), column(words, 4, 3, ZERO).to(dtype)
        c4, c5 = column(words, 4, 4, ZERO).to(dtype), column(words, 4, 5, ZERO).to(dtype)
        c6, c7 = column(words, 4, 6, ZERO).to(dtype), column(words, 4, 7, ZERO).to(dtype)
    return _pair(c0, c1), _pair(c2, c3), _pair(c4, c5), _pair(c6, c7)


@triton.jit
def pairs8(words, dtype: tl.constexpr, PTX: tl.constexpr):
    """Columns 0-1 and 2-3 of words `[R, L]` of 8-bit codes, less 128: `[R, 2 L]` each."""
    if PTX:
        asm: tl.constexpr = decode8(dtype)
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            asm, "=h,=h,=h,=h,r", [words], kinds(dtype, 4), is_pure=True, pack=1
        )
    else:
        c0, c1 = column(words, 8, 0, 128).to(dtype), column(words, 8, 1, 128).to(dtype)
        c2, c3 = column(words, 8, 2, 128).to(dtype), column(words, 8, 3, 128).to(dtype)
    return _pair(c0, c1), _pair(c2, c3)


@triton.jit
def bytes_of(words):
    """The bytes `[R, 4 L]` of words `[R, L]`, int8."""
    R: tl.constexpr = words.shape[0]
    L: tl.constexpr = words.shape[1]
    even = tl.join(words, words >> 16)
    return tl.reshape(tl.join(even, even >> 8).to(tl.int8), (R, 4 * L))


@triton.jit
def codes4(words, SIGNED: tl.constexpr):
    """Columns 0-3 and 4-7 of words `[R, L]` of 4-bit codes: int8 `[R, 4 L]` each."""
    low = words & _LOWS
    high = (words >> 4) & _LOWS
    if SIGNED:
        # byte by byte: less 8, and no byte borrows from the next
        low = ((low | _TOPS) - _EIGHTS) ^ _TOPS
        high = ((high | _TOPS) - _EIGHTS) ^ _TOPS
    return bytes_of(low), bytes_of(high)


@triton.jit
def codes8(words):
    """The columns of words `[R, L]` of 8-bit codes: int8 `[R, 4 L]`."""
    return bytes_of(words ^ _TOPS)


@triton.jit
def columns(x, at, limit, there, MASKED: tl.constexpr):
    """Columns `at` of each row of x, transposed; 0 from column `limit` on, counted like `at`."""
    if MASKED:
        tile = tl.load(
            x[:, None] + at[None, :], mask=there[:, None] & (at < limit)[None, :], other=0
        )
    else:
        tile = tl.load(x[:, None] + at[None, :], mask=there[:, None], other=0)
    return tl.trans(tile)


@triton.jit
def rows_of_x(x, at, limit, there, MASKED: tl.constexpr):
    """Columns `at` of each row of x; 0 from column `limit` on, counted like `at`."""
    if MASKED:
        mask = there[:, None] & (at < limit)[None, :]
        return tl.load(x[:, None] + at[None, :], mask=mask, other=0)
    return tl.load(x[:, None] + at[None, :], mask=there[:, None], other=0)


@triton.jit
def behind(a, b):
    """Columns of a and then those of b: `[R, 2 L]` from `[R, L]` each."""
    R: tl.constexpr = a.shape[0]
    L: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (R, 2 * L))


@triton.jit
def row_offsets(rows, lines):
    """Where the first word of each row lies, counted in words, when a block has `lines` lines."""
    return (rows // 16).to(tl.int64) * lines * 16 + rows % 16


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
