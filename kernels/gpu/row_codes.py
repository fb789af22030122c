"""How a row of float32 becomes codes and a scale: what every kernel for rows ends with."""

import triton
import triton.language as tl

from qpass.ops.quantize import SMALLEST_ROW

# above it lies what is no number
INFINITY_BITS = tl.constexpr(0x7F800000)
# adding it to a small float32 rounds to an integer, ties to even, whose low bits are the last
TO_INTEGER = tl.constexpr(12582912.0)
SMALLEST = tl.constexpr(SMALLEST_ROW)


@triton.jit
def magnitudes(y):
    """As integers magnitudes keep their order, and what is no number is the largest."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scales(largest, BITS: tl.constexpr):
    """From the largest magnitudes: scales of rows, factors to codes, and masks of codes."""
    finite = largest < INFINITY_BITS
    largest = largest.to(tl.float32, bitcast=True)
    counts = finite & (largest >= SMALLEST)
    top = tl.full(largest.shape, 2 ** (BITS - 1) - 1.0, tl.float32)
    safe = tl.where(counts, largest, 1.0)
    scales = tl.where(counts, tl.div_rn(safe, top), tl.where(finite, 0.0, float("nan")))
    return scales, tl.div_rn(top, safe), tl.where(counts, 255, 0)


@triton.jit
def row_codes(y, to_codes, kept):
    """The codes of values; none leaves its range: the largest value times `to_codes` is the top."""
    return ((y * to_codes + TO_INTEGER).to(tl.int32, bitcast=True) & kept).to(tl.int8)
