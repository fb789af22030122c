"""PTX that turns a word of packed codes into 16-bit floats, two at a time.

A code is put below the bits of a power of two whose last place is 1, in one `prmt` for two codes,
and the power comes off again exactly: 2 instructions for 2 values instead of 5.
"""

import triton
import triton.language as tl

# bytes 0, 1 or 2, 3 of the first word, each below the first byte of the second
_PAIRS = ("0x4140", "0x4342")


@triton.constexpr_function
def kinds(dtype, count):
    """The type of each of `count` results."""
    return (dtype,) * count


@triton.constexpr_function
def decode4(dtype, zero):
    """8 codes of 4 bits, less `zero`, from operand $8 to $0 .. $7."""
    bf16 = dtype == tl.bfloat16
    # 128 and 1024: the powers of two with the last place 1
    power = 0x43 if bf16 else 0x64
    lines = [
        ".reg .b32 low, high, pair, one, down;",
        f"mov.b32 one, {'0x3F803F80' if bf16 else '0x3C003C00'};",
        f"mov.b32 down, 0x{(0x8000 | power << 8 | zero) * 0x10001:08X};",
        "and.b32 low, $8, 0x0F0F0F0F;",
        "shr.b32 high, $8, 4;",
        "and.b32 high, high, 0x0F0F0F0F;",
    ]
    for half, source in enumerate(("low", "high")):
        for i, selector in enumerate(_PAIRS):
            at = 4 * half + 2 * i
            lines += [
                f"prmt.b32 pair, {source}, 0x{power * 0x01010101:08X}, {selector};",
                f"fma.rn.{'bf16x2' if bf16 else 'f16x2'} pair, pair, one, down;",
                f"mov.b32 {{${at}, ${at + 1}}}, pair;",
            ]
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def decode8(dtype):
    """4 codes of 8 bits, less 128, from operand $4 to $0 .. $3."""
    bf16 = dtype == tl.bfloat16
    lines = [
        ".reg .b32 pair, base, one, down;",
        f"mov.b32 one, {'0xBF80BF80' if bf16 else '0x3C003C00'};",
        "mov.b32 down, 0xE480E480;",
    ]
    for i, selector in enumerate(_PAIRS):
        if bf16:
            # 7 bits fit below 128; the eighth says whether 128 or 256 comes off
            lines += [
                f"prmt.b32 pair, $4, 0, {selector};",
                "lop3.b32 base, pair, 0x00800080, 0x43004300, 0xAE;",
                "lop3.b32 pair, pair, 0x007F007F, 0x43004300, 0xEA;",
                "fma.rn.bf16x2 pair, base, one, pair;",
            ]
        else:
            lines += [
                f"prmt.b32 pair, $4, 0x64646464, {selector};",
                "fma.rn.f16x2 pair, pair, one, down;",
            ]
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair;")
    return "{" + " ".join(lines) + "}"
