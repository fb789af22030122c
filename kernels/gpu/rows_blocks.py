"""`quantize_blocks`: rows rotated and turned into 4-bit floats in one pass, MXFP4 and NVFP4.

A program holds whole rows in registers, as in `rows.py`; rows that do not fit there while they are
turned are turned by another kernel first. The scale of a block is the one with the
least squared error of those that the specification tries. Sums come in another order, and what is
divided by a scale is multiplied by its reciprocal: of two scales that are as good, and of two codes
that are as near, it may take the other.
"""

# n columns: B blocks of m x P; R rows of activations; T groups of L columns that share a scale

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.e2m1 import nearest_e2m1, nearest_e4m3
from qpass._kernels.gpu.rows import (
    FLOATS,
    LARGEST_FACTOR,
    SLICE,
    geometry,
    refused,
    sylvester,
)
from qpass.ops.quantize import SMALLEST_ROW
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel, choose
from qpass.runtime.target import Target

# most values that one program can hold, and those of one that holds several short rows
MOST_VALUES = 16384
# the same where a factor is multiplied too, which takes registers
MOST_TURNED = 8192
FEW_VALUES = 4096
# columns that share a scale, by the format of the scales
GROUPS = {"e8m0": 32, "e4m3": 16}
# scales that are tried
TRIED = {"e8m0": 2, "e4m3": 4}
# above it lies what is no number
INFINITY_BITS = tl.constexpr(0x7F800000)
SMALLEST = tl.constexpr(SMALLEST_ROW)
# the largest scale of a block times the largest code
TOP = tl.constexpr(448.0 * 6.0)
# more than half of the spacing of E4M3 numbers and less than one, relative to their size
NEXT = tl.constexpr(0.6 * 0.125)


@triton.jit
def beside(wanted, above):
    """The E4M3 number next to each one of 0 .. 448, above or below it."""
    near, _ = nearest_e4m3(wanted)
    # away from the number on the wrong side, by more than half of a spacing
    wrong = tl.where(above, near < wanted, near > wanted)
    step = tl.where(above, NEXT, -NEXT)
    return nearest_e4m3(tl.minimum(tl.where(wrong, near + step * near, near), 448.0))


@triton.jit
def candidate(most, which, E4M3: tl.constexpr):
    """A scale for groups by their largest magnitudes: the number, its reciprocal and its bits.

    The largest magnitude becomes the largest point or, of E4M3 scales, the one before; the scale is
    rounded down and up.
    """
    if E4M3:
        top = tl.full(most.shape, 1.0, tl.float32) * tl.where(which < 2, 6.0, 4.0)
        scale, bits = beside(tl.minimum(tl.div_rn(most, top), 448.0), which % 2 == 1)
        some = tl.where(scale > 0, scale, 1.0)
        back = tl.where(scale > 0, tl.div_rn(tl.full(some.shape, 1.0, tl.float32), some), 0.0)
    else:
        wanted = tl.div_rn(most, tl.full(most.shape, 6.0, tl.float32))
        power = tl.maximum(wanted.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23)
        power += which << 23
        scale = power.to(tl.float32, bitcast=True)
        back = ((254 << 23) - power).to(tl.float32, bitcast=True)
        bits = power >> 23
    return scale, back, bits


@triton.jit
def quantized_groups(y, tried, T: tl.constexpr, L: tl.constexpr, E4M3: tl.constexpr):
    """Groups `y [T, L]` as codes, two to a byte, `[T, L / 2]`, and the bits of their scales.

    So many scales are `tried`, one after another: at once they would fill the registers.
    """
    size = tl.abs(y)
    most = tl.max(size, axis=1)
    best = tl.zeros((T,), tl.float32)
    bits = tl.zeros((T,), tl.int32)
    least = tl.zeros((T,), tl.float32)
    for which in range(tried):
        scale, back, other = candidate(most, which, E4M3)
        point, code = nearest_e2m1(size * back[:, None])
        off = point * scale[:, None] - size
        error = tl.sum(off * off, axis=1)
        better = (error < least) | (which == 0)
        best = tl.where(better, back, best)
        bits = tl.where(better, other, bits)
        least = tl.where(better, error, least)
    point, code = nearest_e2m1(size * best[:, None])
    code |= tl.where((y < 0) & (code > 0), 8, 0)
    low, high = tl.split(tl.reshape(code, (T, L // 2, 2)))
    return low | (high << 4), bits


@triton.jit
def rows_blocks_kernel(
    x_ptr, signs_ptr, factor_ptr, out_ptr, scales_ptr, rows_ptr,
    rows, stride, n, m, blocks, tried, scale,
    ROTATE: tl.constexpr, E4M3: tl.constexpr, L: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, M: tl.constexpr, MB: tl.constexpr,
    P: tl.constexpr, LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * R
    C: tl.constexpr = R * B * P
    c = tl.arange(0, C)
    r = first + c // (B * P)
    block = c // P % B
    inside = (r < rows) & (block < blocks)
    if not ROTATE:
        inside = inside & (c % P < n)
    if M == 1:
        column = block * P + c % P
        x = tl.load(x_ptr + r * stride + column, mask=inside, other=0.0).to(tl.float32)
        if ROTATE:
            x *= tl.load(signs_ptr + column, mask=inside, other=0.0)
            # the factor is 1 or -1
            signed = scale * tl.load(factor_ptr)
            x = tl.reshape(sylvester(tl.reshape(x, (R * B, P)), signed, R * B, P, LOG), (C,))
        y = tl.reshape(x, (1, R, B * P))
    else:
        y = tl.zeros((M, C), tl.float32)
        to = tl.arange(0, M)
        for start in range(0, m, MB):
            i = start + tl.arange(0, MB)
            some = (i < m)[:, None] & inside[None, :]
            column = (block * m)[None, :] * P + i[:, None] * P + (c % P)[None, :]
            x = tl.load(x_ptr + (r * stride)[None, :] + column, mask=some, other=0.0)
            x = x.to(tl.float32) * tl.load(signs_ptr + column, mask=some, other=0.0)
            x = tl.reshape(x, (MB * R * B, P))
            x = tl.reshape(sylvester(x, scale, MB * R * B, P, LOG), (MB, C))
            known = (to < m)[:, None] & (i < m)[None, :]
            turned = tl.load(factor_ptr + i[None, :] * m + to[:, None], mask=known, other=0.0)
            y = tl.dot(turned, x, y, input_precision=PRECISION)
        y = tl.reshape(y, (M, R, B * P))
    # as integers magnitudes keep their order, and what is no number is the largest
    largest = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(largest, axis=2), axis=0)
    finite = largest < INFINITY_BITS
    largest = largest.to(tl.float32, bitcast=True)
    counts = finite & (largest >= SMALLEST)
    y = tl.where(counts[None, :, None], y, 0.0)
    row = first + tl.arange(0, R)
    factors = tl.full((R,), 1.0, tl.float32)
    if E4M3:
        some = tl.where(counts, largest, 1.0)
        factors = tl.div_rn(some, tl.full(some.shape, TOP, tl.float32))
        y *= tl.div_rn(tl.full(some.shape, 1.0, tl.float32), factors)[None, :, None]
        factors = tl.where(counts, factors, 1.0)
    factors = tl.where(finite, factors, float("nan"))
    tl.store(rows_ptr + row, factors, mask=row < rows)
    T: tl.constexpr = M * C // L
    codes, bits = quantized_groups(tl.reshape(y, (T, L)), tried, T, L, E4M3)
    # groups lie one after another in rows, and rows in places of the factor
    t = tl.arange(0, T)
    EACH: tl.constexpr = B * P // L
    place = t % EACH * L
    r = first + t // EACH % R
    at = t // (EACH * R)
    column = place // P * m * P + at * P + place % P
    real = (r < rows) & (at < m) & (place < blocks * P) & (column < n)
    half = tl.arange(0, L // 2)
    byte = (r * n + column) // 2
    tl.store(
        out_ptr + byte[:, None] + half[None, :],
        codes.to(tl.uint8),
        mask=real[:, None],
    )
    tl.store(scales_ptr + (r * n + column) // L, bits.to(tl.uint8), mask=real)


def _tile(blocks: int, m: int, power: int) -> dict[str, int]:
    """The sizes of a program for rows of so many blocks of m x power."""
    blocks = triton.next_power_of_2(blocks)
    order = 1 if m == 1 else max(SLICE, triton.next_power_of_2(m))
    # a product of matrices has at least as many columns as a slice
    least = 1 if m == 1 else max(1, SLICE // (blocks * power))
    return {
        "R": max(least, FEW_VALUES // (order * blocks * power)),
        "B": blocks,
        "M": order,
        "MB": min(order, SLICE),
        "P": power,
        "LOG": power.bit_length() - 1,
    }


def _values(tile: dict[str, int]) -> int:
    return tile["R"] * tile["B"] * tile["M"] * tile["P"]


def _warps(tile: dict[str, int], target: Target) -> int:
    """So many warps that a thread holds 16 values, or more where a block has no more threads."""
    return min(512 // target.warp, max(1, _values(tile) // (16 * target.warp)))


def _precision(tile: dict[str, int], target: Target) -> str:
    """How a factor is multiplied: as float32, or on tensor cores to nearly the same precision."""
    return "ieee" if tile["M"] <= SLICE or target.backend != "cuda" else "tf32x3"


def _accepts(call: Call) -> str | None:
    if (why := refused(call)) is not None:
        return why
    n = call["x"].shape[-1]
    scales, group = call["scale_format"], call["block"]
    if GROUPS.get(scales) != group:
        known = " and ".join(f"{size} by {name}" for name, size in GROUPS.items())
        return f"blocks of {group} by {scales}; it makes those of hardware, {known}"
    if n % group:
        return f"rows of {n} do not divide into blocks of {group}"
    values = triton.next_power_of_2(n)
    if values > MOST_VALUES:
        return f"a row of {n} fills {values} places; a program holds {MOST_VALUES}"
    x = torch.empty(call["x"].shape, device="meta")
    if (
        call["factor"] is not None
        and not _at_once(call)
        and choose(_turned(call, x)).kernel is None
    ):
        return f"no kernel turns rows of {n} before they are quantized"
    return None


def _at_once(call: Call) -> bool:
    """Whether one program turns and quantizes whole rows."""
    n, m, power = geometry(call)
    if m > 1 and power % call["block"]:
        return False
    values = _values(_tile(n // (m * power), m, power))
    return m <= LARGEST_FACTOR and values <= (MOST_VALUES if m == 1 else MOST_TURNED)


def _turned(call: Call, x: Tensor) -> Call:
    """The rotation of a call alone, of its rows in float32."""
    rest = (call["signs"], call["factor"], call["power"])
    return Call.of("hadamard", (x, *rest), call.target)


def _launch(call: Call):
    if call["factor"] is not None and not _at_once(call):
        # in two passes: the rotation as such, and rows as they are
        turned = _turned(call, call["x"].to(torch.float32))
        kernel = choose(turned).kernel
        assert kernel is not None
        given = (kernel.launch(turned), call["block"], call["scale_format"])
        return _launch(Call.of("quantize_blocks", given, call.target))
    x, signs, factor = call["x"], call["signs"], call["factor"]
    group = call["block"]
    n, m, power = geometry(call)
    rows_rn = x.reshape(-1, n)
    if rows_rn.stride(-1) != 1:
        rows_rn = rows_rn.contiguous()
    lead, rows = x.shape[:-1], rows_rn.shape[0]
    codes = torch.empty((*lead, n // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*lead, n // group), dtype=torch.uint8, device=x.device)
    factors = torch.empty((*lead, 1), dtype=torch.float32, device=x.device)
    if rows:
        # rows that are not rotated are one block, of which some places are empty
        power = triton.next_power_of_2(n) if factor is None else power
        blocks = 1 if factor is None else n // (m * power)
        tile = _tile(blocks, m, power)
        rows_blocks_kernel[(triton.cdiv(rows, tile["R"]),)](
            rows_rn, signs, factor, codes, scales, factors,
            rows, rows_rn.stride(0), n, m, blocks,
            TRIED[call["scale_format"]], power**-0.5,
            ROTATE=factor is not None, E4M3=call["scale_format"] == "e4m3", L=group, **tile,
            PRECISION=_precision(tile, call.target),
            num_warps=_warps(tile, call.target), num_stages=1,
        )  # fmt: skip
    return codes, scales, factors


def _cost(call: Call) -> Cost:
    x, (n, m, power) = call["x"], geometry(call)
    rows = x.numel() // n
    rotates = call["factor"] is not None
    tried = TRIED[call["scale_format"]]
    # an addition for each step of rounding and of the error
    adds = n * (power.bit_length() - 1 + 2 * m) * rotates + 8 * n * (tried + 1)
    written = n / 2 + n / call["block"] + 4
    nbytes = rows * (n * x.element_size() + written) + 4 * n * rotates
    return Cost(nbytes, rows * adds, "fp32")


SHAPES = ((4096, 1, 4096), (3072, 12, 256), (8192, 1, 8192))
ROWS = 4096


def _builds(target: Target) -> Sequence[Build]:
    found: list[Build] = []
    for n, m, power in SHAPES:
        for scales, group in GROUPS.items():
            x = torch.empty(ROWS, n, dtype=torch.bfloat16, device="meta")
            signs, factor = torch.empty(n, device="meta"), torch.empty(m, m, device="meta")
            given = (x, group, scales, signs, factor, power)
            tile = _tile(n // (m * power), m, power)
            found.append(
                Build(
                    label=f"{n} = {m} x {power}, e2m1 / {group} / {scales}",
                    function=rows_blocks_kernel,
                    signature={
                        "x_ptr": f"*{FLOATS[x.dtype]}", "signs_ptr": "*fp32",
                        "factor_ptr": "*fp32", "out_ptr": "*u8", "scales_ptr": "*u8",
                        "rows_ptr": "*fp32", "rows": "i32", "stride": "i32", "n": "i32",
                        "m": "i32", "blocks": "i32", "tried": "i32", "scale": "fp32",
                    },
                    constants={
                        "ROTATE": True, "E4M3": scales == "e4m3", "L": group, **tile,
                        "PRECISION": _precision(tile, target),
                    },
                    warps=_warps(tile, target),
                    stages=1,
                    divisible=frozenset({"rows", "stride", "n"}),
                    cost=_cost(Call.of("quantize_blocks", given, target)),
                    programs=triton.cdiv(ROWS, tile["R"]),
                )
            )  # fmt: skip
    return found


KERNELS.add(
    Kernel(
        name="quantize_blocks",
        operator="quantize_blocks",
        accepts=_accepts,
        launch=_launch,
        cost=_cost,
        builds=_builds,
    )
)
