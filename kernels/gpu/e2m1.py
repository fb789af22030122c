"""Arithmetic on 4-bit floats and their scales, on bits: exact, and the same on every target."""

import triton
import triton.language as tl


@triton.jit
def nearest_e2m1(magnitude):
    """The E2M1 point nearest to each magnitude, ties to even, and its code; 6 for larger ones.

    Numbers of one power of two are evenly spaced: adding a multiple of the power whose last place
    is the spacing rounds, and leaves how many spacings there are in the low bits.
    """
    magnitude = tl.minimum(magnitude, 6.0)
    power = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    large = (power + (22 << 23)) | 0x400000
    shifted = magnitude + large.to(tl.float32, bitcast=True)
    point = shifted - large.to(tl.float32, bitcast=True)
    # two spacings of a power come before those of the next
    return point, shifted.to(tl.int32, bitcast=True) - large + ((power >> 22) - 254)


@triton.jit
def nearest_e4m3(number):
    """The E4M3 number nearest to each one of 0 .. 448, ties to even, and its bits."""
    power = tl.maximum(number.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    large = (power + (20 << 23)) | 0x400000
    shifted = number + large.to(tl.float32, bitcast=True)
    stored = shifted - large.to(tl.float32, bitcast=True)
    bits = shifted.to(tl.int32, bitcast=True) - large + (((power >> 23) - 121) << 3)
    return stored, bits


@triton.jit
def e2m1_numbers(codes):
    """The numbers of E2M1 codes, in float32: their bits are an exponent and a mantissa."""
    bits = ((codes & 7) << 22).to(tl.float32, bitcast=True) * 2.0**126
    return tl.where((codes & 8) != 0, -bits, bits)


@triton.jit
def scale_numbers(bits, E4M3: tl.constexpr):
    """The numbers of scales, in float32, from their bits as integers."""
    if E4M3:
        # positive ones; the power of two makes up for another bias, subnormal numbers included
        return (bits << 20).to(tl.float32, bitcast=True) * 2.0**120
    # 2^-127 has a pattern of its own, and all bits are no number
    found = tl.where(bits == 0, 0x400000, bits << 23)
    return tl.where(bits == 255, 0x7FC00000, found).to(tl.float32, bitcast=True)
