"""Rows rotated by Sylvester matrices up to order 4096 and quantized, as columns of a product.

`H_n = H_a (x) H_128`. A product on tensor cores of H_128 with 128 columns, each 128 neighbours of a
row, does the inner 7 stages exactly but for the order of float32 sums. Which column is which part
of which row is chosen so that a thread then holds all parts of its rows: no stage that is left
moves a value between threads. Programs stay and take rows in turn.
"""

# a row: A parts of 128 values; R rows of activations at a time, R * A = 128

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qpass._kernels.gpu.row_codes import TO_INTEGER, magnitudes, row_scales
from qpass._kernels.gpu.rows import Task, Turns, geometry, refused, register, rows_cost, tuning
from qpass._kernels.gpu.rows_tensor import INNER, TYPES, hadamard_rows
from qpass._kernels.gpu.tiles import TOGETHER
from qpass.runtime.gpu import Build, Call
from qpass.runtime.target import Target

# columns of the product
COLUMNS = 128
# orders of Sylvester matrices: a thread holds at least two parts, and pieces of four rows
LEAST, MOST = 2 * INNER, COLUMNS // 4 * INNER
# fewer rows do not pay for what every program makes first
FEWEST_ROWS = 256
WARPS = 8
# turns whose rows are asked for before their time, and bytes of shared memory that each takes
STAGES, STAGE = 3, COLUMNS * INNER * 2
# programs on one multiprocessor
RESIDENT = 1


@triton.jit
def _stage(y, HIGH: tl.constexpr, LOW: tl.constexpr):
    """One stage on a bit of the column number, with HIGH numbers above it and LOW below."""
    pairs = tl.permute(tl.reshape(y, (128, HIGH, 2, LOW)), (0, 1, 3, 2))
    low, high = tl.split(pairs)
    both = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(both, (128, HIGH * 2 * LOW))


@triton.jit
def rows_turned_kernel(
    x_ptr, signs_ptr, factor_ptr, out_ptr, scales_ptr,
    rows, stride, n, scale,
    BITS: tl.constexpr, R: tl.constexpr, A: tl.constexpr, LOG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    inner = tl.arange(0, 128)
    place = tl.arange(0, A)[:, None] * 128 + inner[None, :]
    signs = tl.load(signs_ptr + place).to(dtype)[None, :, :]
    if BITS > 0:
        # a thread holds rows i and i + 8 of the product: let them be neighbours in a row of codes
        h = hadamard_rows(inner // 16 * 16 + inner % 8 * 2 + inner // 8 % 2, 128, dtype)
    else:
        h = hadamard_rows(inner, 128, dtype)
    # the factor is 1 or -1
    scale *= tl.load(factor_ptr)
    # numbers of columns: rows above, parts, 4 rows that lie in 4 threads, 2 parts
    number = tl.arange(0, R * A)
    part = number // 8 % (A // 2) * 2 + number % 2
    row_of = number // (4 * A) * 4 + number // 2 % 4
    wide: tl.constexpr = 64 if BITS > 0 else 128
    target = part[:, None] * wide + tl.arange(0, wide)[None, :]
    for turn in tl.range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0), num_stages=STAGES):
        r = (turn * R + tl.arange(0, R))[:, None, None]
        at = r.to(tl.int64) * stride + place[None, :, :]
        x = tl.load(x_ptr + at, mask=r < rows, other=0.0) * signs
        x = tl.permute(tl.reshape(x, (R // 4, 4, A // 2, 2, 128)), (0, 2, 1, 3, 4))
        y = tl.dot(h, tl.trans(tl.reshape(x, (R * A, 128))))
        if LOG > 1:
            y = _stage(y, R * A // 2, 1)
        for step in tl.static_range(LOG - 2):
            y = _stage(y, R * A // 2 // (8 * 2**step), 8 * 2**step)
        # the last stage, on the highest bit of a part's number
        LOW: tl.constexpr = 8 * 2 ** (LOG - 2) if LOG > 1 else 1
        HIGH: tl.constexpr = R * A // 2 // LOW
        low, high = tl.split(tl.permute(tl.reshape(y, (128, HIGH, 2, LOW)), (0, 1, 3, 2)))
        y = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
        y = tl.reshape(y, (128, R * A))
        to = turn * R + row_of
        held = (to < rows)[:, None]
        if BITS == 0:
            out = out_ptr + (to.to(tl.int64) * n)[:, None] + target
            tl.store(out, tl.trans((y * scale).to(out_ptr.dtype.element_ty)), mask=held)
        else:
            y = tl.reshape(y, (128, R // 4, A // 2, 4, 2))
            # the larger of a sum and a difference is the sum of magnitudes, after rounding too
            size = magnitudes(tl.abs(low) + tl.abs(high))
            if LOG > 1:
                size = tl.max(tl.reshape(size, (128, R // 4, A // 4, 4, 2)), axis=4)
            else:
                size = tl.reshape(size, (128, R // 4, 1, 4))
            size = tl.max(tl.max(size, axis=2), axis=0)
            largest = tl.reshape(size, (R,)).to(tl.float32, bitcast=True) * tl.abs(scale)
            found, to_codes, kept = row_scales(largest.to(tl.int32, bitcast=True), BITS)
            to_codes = tl.reshape(to_codes * scale, (R // 4, 4))[None, :, None, :, None]
            # two codes make an int16, which moves between threads faster than bytes do
            shifted = (y * to_codes + TO_INTEGER).to(tl.int32, bitcast=True)
            pairs = tl.permute(tl.reshape(shifted, (8, 2, 8, R * A)), (0, 2, 3, 1))
            first, second = tl.split(pairs)
            both = tl.reshape((first & 255) | (second << 8), (64, R // 4, A // 2, 4, 2))
            kept = tl.reshape(kept * 257, (R // 4, 4))[None, :, None, :, None]
            both = tl.trans(tl.reshape((both & kept).to(tl.int16), (64, R * A)))
            out = out_ptr + (to.to(tl.int64) * (n // 2))[:, None] + target
            tl.store(out, both, mask=held)
            row = turn * R + tl.arange(0, R)
            tl.store(scales_ptr + row, found, mask=row < rows)


def _accepts(call: Call) -> str | None:
    if (why := refused(call)) is not None:
        return why
    x = call["x"]
    if x.dtype not in TYPES:
        return f"rows of {x.dtype}; tensor cores multiply 16-bit floats"
    if call["factor"] is None:
        return "rows that are not rotated have no product"
    n, m, power = geometry(call)
    if m != 1 or n != power:
        return f"{n} columns in blocks with a factor of order {m}; it rotates them all at once"
    if not LEAST <= power <= MOST:
        return f"a Sylvester matrix of order {power}; it multiplies by orders {LEAST} to {MOST}"
    rows = x.numel() // n
    if rows < FEWEST_ROWS:
        return f"{rows} rows; what a program makes first is worth {FEWEST_ROWS}"
    return _declined(call.operator, call.target)


def _declined(operator: str, target: Target) -> str | None:
    """Why the kernel is none for a target, or None."""
    if target.backend != "cuda":
        return f"{target.name} gives a product's columns to threads in another order"
    if operator == "quantize_rows" and target.name not in TOGETHER:
        return f"where a warp multiplies by itself, as on {target.name}, registers do not suffice"
    return None


def run(call: Call, turns: Turns):
    """Serve a call with a given configuration."""
    task = Task.of(call)
    rows, n = task.rows.shape
    tile = _tile(n)
    programs = min(triton.cdiv(rows, tile["R"]), turns.resident * call.target.multiprocessors)
    rows_turned_kernel[(programs,)](
        task.rows, call["signs"], call["factor"],
        task.out.view(torch.int16) if task.bits else task.out, task.scales,
        rows, task.rows.stride(0), n, n**-0.5,
        BITS=task.bits, **tile, STAGES=turns.stages, num_warps=WARPS,
    )  # fmt: skip
    return task.result


def _tile(n: int) -> dict[str, int]:
    parts = n // INNER
    return {"R": COLUMNS // parts, "A": parts, "LOG": parts.bit_length() - 1}


SHAPES = (4096, 1024, 256)
ROWS = 4096


def _builds(operator: str, widths: tuple[int, ...], target: Target) -> Sequence[Build] | str:
    if (why := _declined(operator, target)) is not None:
        return why
    found: list[Build] = []
    bits = widths[0]
    for n in SHAPES:
        tile = _tile(n)
        x = torch.empty(ROWS, n, dtype=torch.bfloat16, device="meta")
        rest = (torch.empty(n, device="meta"), torch.empty(1, 1, device="meta"), n)
        call = Call.of(operator, (x, bits, *rest) if bits else (x, *rest), target)
        found.append(
            Build(
                label=f"{n}, {f'int{bits}' if bits else 'bf16'}",
                function=rows_turned_kernel,
                signature={
                    "x_ptr": "*bf16", "signs_ptr": "*fp32", "factor_ptr": "*fp32",
                    "out_ptr": "*i16" if bits else "*bf16", "scales_ptr": "*fp32",
                    "rows": "i32", "stride": "i32", "n": "i32", "scale": "fp32",
                },
                constants={"BITS": bits, **tile, "STAGES": usual(target).stages},
                warps=WARPS,
                stages=usual(target).stages,
                mma="bf16",
                divisible=frozenset({"rows", "stride", "n"}),
                cost=rows_cost(call),
                programs=RESIDENT * target.multiprocessors,
            )
        )  # fmt: skip
    return found


def usual(target: Target) -> Turns:
    """So many stages as fit beside the two tiles of a product."""
    return Turns(min(STAGES, max(1, target.shared // STAGE - 2)), RESIDENT)


register("turned", _accepts, tuning(run, usual), _builds, preference=20)
