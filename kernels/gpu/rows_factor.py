"""Rows rotated by `factor (x) H` and quantized, the factor on tensor cores.

The factor comes first, while the numbers still have 16 bits: it is divided by its largest entry and
split into three of their type, whose products are exact and are added in float32. All entries of a
Hadamard matrix are then 1 or -1, and the first of the three is everything. Butterflies follow, in
another order of sums than the specification's.
"""

# n columns: B blocks of m x P; R rows of activations; M is m padded, to a power of two

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qpass._kernels.gpu.row_codes import magnitudes, row_codes, row_scales
from qpass._kernels.gpu.rows import (
    LARGEST_FACTOR,
    Task,
    geometry,
    refused,
    register,
    rows_cost,
    sylvester,
)
from qpass.runtime.gpu import Build, Call
from qpass.runtime.target import Target

VALUES = 8192
MOST_VALUES = 32768
# columns of the factor that one product sums over
SLICE = 16
TYPES = (torch.bfloat16, torch.float16)


@triton.jit
def split_factor(factor_ptr, parts_ptr, about_ptr, m, M: tl.constexpr, ROWS: tl.constexpr):
    """Transposed, padded with zeros, over its largest entry, as three 16-bit floats `[3, M, M]`.

    `about` becomes the largest entry and, for each ROWS of the result, whether the first part lacks
    anything.
    """
    i = tl.arange(0, M)
    largest = 0.0
    for start in range(0, m, ROWS):
        j = start + tl.arange(0, ROWS)
        known = (j < m)[:, None] & (i < m)[None, :]
        some = tl.load(factor_ptr + j[:, None] * m + i[None, :], mask=known, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(some), axis=1), axis=0))
    to = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = (to < m)[:, None] & (i < m)[None, :]
    f = tl.load(factor_ptr + i[None, :] * m + to[:, None], mask=known, other=0.0)
    f = tl.div_rn(f, tl.full(f.shape, largest, tl.float32))
    place = to[:, None] * M + i[None, :]
    dtype: tl.constexpr = parts_ptr.dtype.element_ty
    high = f.to(dtype)
    rest = f - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    tl.store(parts_ptr + place, high)
    tl.store(parts_ptr + M * M + place, middle)
    tl.store(parts_ptr + 2 * M * M + place, low)
    tl.store(about_ptr, largest, mask=tl.program_id(0) == 0)
    lacking = tl.max(tl.max(tl.abs(rest), axis=1), axis=0)
    tl.store(about_ptr + 1 + tl.program_id(0), lacking)


@triton.jit
def rows_factor_kernel(
    x_ptr, signs_ptr, parts_ptr, about_ptr, out_ptr, scales_ptr,
    rows, stride, n, m, blocks, scale,
    BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
    P: tl.constexpr, LOG: tl.constexpr, SLICE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * R
    C: tl.constexpr = R * B * P
    c = tl.arange(0, C)
    r = first + c // (B * P)
    block = c // P % B
    inside = (r < rows) & (block < blocks)
    from_ = (block * m) * P + c % P
    to = tl.arange(0, M)
    largest = tl.load(about_ptr)
    lacking = tl.max(tl.load(about_ptr + 1 + tl.arange(0, SPLITS)), axis=0)
    y = tl.zeros((M, C), tl.float32)
    for start in range(0, m, SLICE):
        i = start + tl.arange(0, SLICE)
        some = (i < m)[:, None] & inside[None, :]
        column = i[:, None] * P + from_[None, :]
        x = tl.load(x_ptr + (r * stride)[None, :] + column, mask=some, other=0.0)
        signs = tl.load(signs_ptr + column, mask=some, other=0.0)
        # signs are 1 and -1
        x *= signs.to(x.dtype)
        part = parts_ptr + to[:, None] * M + i[None, :]
        y = tl.dot(tl.load(part), x, y)
        if lacking > 0:
            y = tl.dot(tl.load(part + M * M), x, y)
            y = tl.dot(tl.load(part + 2 * M * M), x, y)
    y = sylvester(tl.reshape(y, (M * R * B, P)), scale * largest, M * R * B, P, LOG)
    y = tl.reshape(y, (M, R, B * P))
    held = tl.reshape((to < m)[:, None] & inside[None, :], (M, R, B * P))
    place = tl.reshape((r * n)[None, :] + to[:, None] * P + from_[None, :], (M, R, B * P))
    if BITS == 0:
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=held)
    else:
        found, to_codes, kept = row_scales(tl.max(tl.max(magnitudes(y), axis=2), axis=0), BITS)
        codes = row_codes(y, to_codes[None, :, None], kept[None, :, None])
        tl.store(out_ptr + place, codes, mask=held)
        row = first + tl.arange(0, R)
        tl.store(scales_ptr + row, found, mask=row < rows)


def _tile(blocks: int, m: int, power: int) -> dict[str, int]:
    """The sizes of a program for rows of so many blocks of m x power."""
    blocks = triton.next_power_of_2(blocks)
    order = max(16, triton.next_power_of_2(m))
    # a product of matrices has at least 16 columns
    rows = max(1, 16 // (blocks * power), VALUES // (order * blocks * power))
    return {"R": rows, "B": blocks, "M": order, "P": power, "LOG": power.bit_length() - 1}


def _values(tile: dict[str, int]) -> int:
    return tile["R"] * tile["B"] * tile["M"] * tile["P"]


def _accepts(call: Call) -> str | None:
    if (why := refused(call)) is not None:
        return why
    x = call["x"]
    if x.dtype not in TYPES:
        return f"rows of {x.dtype}; tensor cores multiply 16-bit floats"
    if call["factor"] is None:
        return "rows that are not rotated have no product"
    n, m, power = geometry(call)
    if not 1 < m <= LARGEST_FACTOR:
        return f"a factor of order {m}; it multiplies by orders from 2 to {LARGEST_FACTOR}"
    values = _values(_tile(n // (m * power), m, power))
    if values > MOST_VALUES:
        return f"a row of {n} fills {values} places; a program holds {MOST_VALUES}"
    return None


def _warps(tile: dict[str, int], target: Target) -> int:
    """So many that a thread holds 64 values."""
    return max(4, min(16, _values(tile) // (64 * 32))) * 32 // target.warp


def _launch(call: Call):
    task, (n, m, power) = Task.of(call), geometry(call)
    rows, x = task.rows.shape[0], task.rows
    tile = _tile(n // (m * power), m, power)
    order = tile["M"]
    parts = x.new_empty((3, order, order))
    splits = order // SLICE
    about = x.new_empty(1 + splits, dtype=torch.float32)
    if rows:
        split_factor[(splits,)](call["factor"], parts, about, m, M=order, ROWS=SLICE, num_warps=4)
        rows_factor_kernel[(triton.cdiv(rows, tile["R"]),)](
            x, call["signs"], parts, about, task.out, task.scales,
            rows, x.stride(0), n, m, n // (m * power), power**-0.5,
            BITS=task.bits, **tile, SLICE=SLICE, SPLITS=splits,
            num_warps=_warps(tile, call.target), num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return task.result


SHAPES = ((14336, 28, 512), (3072, 12, 256), (11008, 172, 64))
ROWS = 4096


def _builds(operator: str, widths: tuple[int, ...], target: Target) -> Sequence[Build]:
    found: list[Build] = []
    bits = widths[0]
    for n, m, power in SHAPES:
        tile = _tile(n // (m * power), m, power)
        x = torch.empty(ROWS, n, dtype=torch.bfloat16, device="meta")
        rest = (torch.empty(n, device="meta"), torch.empty(m, m, device="meta"), power)
        call = Call.of(operator, (x, bits, *rest) if bits else (x, *rest), target)
        found.append(
            Build(
                label=f"{n} = {m} x {power}, {f'int{bits}' if bits else 'bf16'}",
                function=rows_factor_kernel,
                signature={
                    "x_ptr": "*bf16", "signs_ptr": "*fp32", "parts_ptr": "*bf16",
                    "about_ptr": "*fp32", "out_ptr": "*i8" if bits else "*bf16",
                    "scales_ptr": "*fp32", "rows": "i32", "stride": "i32", "n": "i32", "m": "i32",
                    "blocks": "i32", "scale": "fp32",
                },
                constants={"BITS": bits, **tile, "SLICE": SLICE, "SPLITS": tile["M"] // SLICE},
                warps=_warps(tile, target),
                stages=1,
                mma="bf16",
                divisible=frozenset({"rows", "stride", "n"}),
                fusion=False,
                cost=rows_cost(call),
                programs=triton.cdiv(ROWS, tile["R"]),
            )
        )  # fmt: skip
    return found


register("factor", _accepts, _launch, _builds, preference=10)
