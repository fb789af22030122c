"""Rows rotated by wide Sylvester matrices and quantized: the inner stages on tensor cores.

`H_n = H_a (x) H_128`: numbers of 16 bits times 1 and -1 are exact in a product of matrices, which
then adds them in float32 in an order of its own; butterflies do the a outer stages. Programs stay
and take rows in turn, so that H_128 and the signs are made once. See Agarwal et al., "HadaCore:
Tensor Core Accelerated Hadamard Transform Kernel", 2024.
"""

# n columns: B blocks of A x 128; R rows of activations at a time

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qpass._kernels.gpu.row_codes import magnitudes, row_codes, row_scales
from qpass._kernels.gpu.rows import (
    Task,
    Turns,
    butterfly,
    geometry,
    refused,
    register,
    rows_cost,
    tuning,
)
from qpass.runtime.gpu import Build, Call
from qpass.runtime.target import Target

INNER = 128
# values of one turn: 64 for each thread
VALUES = 8192
MOST_VALUES = 16384
# fewer rows do not pay for what every program makes first
FEWEST_ROWS = 64
# up to here butterflies are as fast: on an H200, 8192 rows of 4096 take 54 us with them and 62 us
# here, and 8192 rows of 8192 take 123 us and 114 us
BUTTERFLIES = 4096
TYPES = (torch.bfloat16, torch.float16)


@triton.jit
def hadamard_rows(i, ORDER: tl.constexpr, dtype: tl.constexpr):
    """Rows i of the Sylvester matrix: entry (i, j) is -1 where i & j has an odd number of ones."""
    odd = i[:, None] & tl.arange(0, ORDER)[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.float32).to(dtype)


@triton.jit
def rows_tensor_kernel(
    x_ptr, signs_ptr, factor_ptr, out_ptr, scales_ptr,
    rows, stride, n, blocks, scale,
    BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, A: tl.constexpr, LOG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    i = tl.arange(0, 128)
    # parts of 128 columns: rows of activations, blocks, and places in a block
    part = tl.arange(0, R * B * A)
    inside = part // A % B < blocks
    column = (part % (B * A))[:, None] * 128 + i[None, :]
    signs = tl.load(signs_ptr + column, mask=inside[:, None], other=0.0).to(dtype)
    h = hadamard_rows(i, 128, dtype)
    # the factor is 1 or -1
    scale *= tl.load(factor_ptr)
    for turn in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        r = turn * R + part // (B * A)
        held = ((r < rows) & inside)[:, None]
        place = r.to(tl.int64)
        x = tl.load(x_ptr + (place * stride)[:, None] + column, mask=held, other=0.0) * signs
        y = tl.reshape(tl.dot(x, h), (R * B, A * 128))
        for step in tl.static_range(LOG):
            y = butterfly(y, R * B, A * 128, 128 * 2**step)
        y = tl.reshape(y * scale, (R, B * A * 128))
        place = (place * n)[:, None] + column
        if BITS == 0:
            y = tl.reshape(y, (R * B * A, 128)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, y, mask=held)
        else:
            found, to_codes, kept = row_scales(tl.max(magnitudes(y), axis=1), BITS)
            codes = row_codes(y, to_codes[:, None], kept[:, None])
            tl.store(out_ptr + place, tl.reshape(codes, (R * B * A, 128)), mask=held)
            row = turn * R + tl.arange(0, R)
            tl.store(scales_ptr + row, found, mask=row < rows)


def _tile(blocks: int, power: int) -> dict[str, int]:
    """The sizes of one turn for rows of so many blocks of `power`."""
    blocks = triton.next_power_of_2(blocks)
    rows = max(1, VALUES // (blocks * power))
    order = power // INNER
    return {"R": rows, "B": blocks, "A": order, "LOG": order.bit_length() - 1}


def _values(tile: dict[str, int]) -> int:
    return tile["R"] * tile["B"] * tile["A"] * INNER


def _accepts(call: Call) -> str | None:
    if (why := refused(call)) is not None:
        return why
    x = call["x"]
    if x.dtype not in TYPES:
        return f"rows of {x.dtype}; tensor cores multiply 16-bit floats"
    if call["factor"] is None:
        return "rows that are not rotated have no product"
    n, m, power = geometry(call)
    if m != 1:
        return f"a factor of order {m}; it has none"
    if power <= BUTTERFLIES:
        return f"a Sylvester matrix of order {power}; butterflies do up to {BUTTERFLIES} as fast"
    rows = x.numel() // n
    if rows < FEWEST_ROWS:
        return f"{rows} rows; what a program makes first is worth {FEWEST_ROWS}"
    values = _values(_tile(n // power, power))
    if values > MOST_VALUES:
        return f"a row of {n} fills {values} places; a program holds {MOST_VALUES}"
    return None


def warps(tile: dict[str, int], target: Target) -> int:
    """So many that a thread holds 64 values."""
    return max(4, _values(tile) // (64 * 32)) * 32 // target.warp


# turns whose rows are asked for before their time
STAGES = 2
# programs on one multiprocessor
RESIDENT = 2


def run(call: Call, turns: Turns):
    """Serve a call with a given configuration."""
    task, (n, _, power) = Task.of(call), geometry(call)
    rows = task.rows.shape[0]
    tile = _tile(n // power, power)
    programs = min(triton.cdiv(rows, tile["R"]), turns.resident * call.target.multiprocessors)
    rows_tensor_kernel[(programs,)](
        task.rows, call["signs"], call["factor"], task.out, task.scales,
        rows, task.rows.stride(0), n, n // power, power**-0.5,
        BITS=task.bits, **tile, STAGES=turns.stages,
        num_warps=warps(tile, call.target), enable_fp_fusion=False,
    )  # fmt: skip
    return task.result


SHAPES = ((8192, 8192), (16384, 16384))
ROWS = 4096


def _builds(operator: str, widths: tuple[int, ...], target: Target) -> Sequence[Build]:
    found: list[Build] = []
    bits = widths[0]
    for n, power in SHAPES:
        tile = _tile(n // power, power)
        x = torch.empty(ROWS, n, dtype=torch.bfloat16, device="meta")
        signs, factor = torch.empty(n, device="meta"), torch.empty(1, 1, device="meta")
        rest = (signs, factor, power)
        call = Call.of(operator, (x, bits, *rest) if bits else (x, *rest), target)
        found.append(
            Build(
                label=f"{n} = {n // power} x {power}, {f'int{bits}' if bits else 'bf16'}",
                function=rows_tensor_kernel,
                signature={
                    "x_ptr": "*bf16", "signs_ptr": "*fp32", "factor_ptr": "*fp32",
                    "out_ptr": "*i8" if bits else "*bf16", "scales_ptr": "*fp32",
                    "rows": "i32", "stride": "i32", "n": "i32", "blocks": "i32", "scale": "fp32",
                },
                constants={"BITS": bits, **tile, "STAGES": STAGES},
                warps=warps(tile, target),
                stages=STAGES,
                mma="bf16",
                divisible=frozenset({"rows", "stride", "n"}),
                fusion=False,
                cost=rows_cost(call),
                programs=RESIDENT * target.multiprocessors,
            )
        )  # fmt: skip
    return found


register("tensor", _accepts, tuning(run, lambda _: Turns(STAGES, RESIDENT)), _builds, preference=10)
