"""Rows of activations, rotated and quantized in one pass: `hadamard` and `quantize_rows`.

A program holds whole rows in registers, in float32: each activation is read once and written once.
The butterflies add in the order of the specification, so with a factor of order 1 the results are
its results bit for bit. A larger factor is a product of matrices, whose sums may come in another
order: then a code next to a tie may be one off.
"""

# n columns: B blocks of m x P, of which a program reads MB x P at a time; R rows of activations

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.row_codes import magnitudes, row_codes, row_scales
from qpass._kernels.gpu.weights import flat
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, bucket, launch

# most values that one program can hold: 64 for each thread of 16 warps
MOST_VALUES = 32768
# values of a program that holds several short rows
FEW_VALUES = 4096
# largest order of a factor, padded to a power of two
LARGEST_FACTOR = 256
# slices of a factor, as narrow as a product of matrices may be
SLICE = 16

FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def butterfly(x, R: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, (R, P // (2 * HALF), 2, HALF)), (0, 1, 3, 2))
    low, high = tl.split(pairs)
    both = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
    return tl.reshape(both, (R, P))


@triton.jit
def sylvester(x, scale, R: tl.constexpr, P: tl.constexpr, LOG: tl.constexpr):
    """The last axis of `x [R, P]` times the orthonormal Sylvester matrix of order P."""
    for i in tl.static_range(LOG):
        x = butterfly(x, R, P, 2**i)
    return x * scale


@triton.jit
def rows_kernel(
    x_ptr, signs_ptr, factor_ptr, out_ptr, scales_ptr,
    rows, stride, n, m, blocks, scale,
    ROTATE: tl.constexpr, BITS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, M: tl.constexpr, MB: tl.constexpr,
    P: tl.constexpr, LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * R
    # the columns of a product: rows of activations, blocks, and places in a block
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
        place = r * n + column
        y = tl.reshape(x, (R, B * P))
        place = tl.reshape(place, (R, B * P))
        held = tl.reshape(inside, (R, B * P))
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
        column = (block * m)[None, :] * P + to[:, None] * P + (c % P)[None, :]
        place = (r * n)[None, :] + column
        held = (to < m)[:, None] & inside[None, :]
        y = tl.reshape(y, (M, R, B * P))
        place = tl.reshape(place, (M, R, B * P))
        held = tl.reshape(held, (M, R, B * P))
    if BITS == 0:
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=held)
    else:
        bits = magnitudes(y)
        largest = tl.max(bits, axis=1) if M == 1 else tl.max(tl.max(bits, axis=2), axis=0)
        found, to_codes, kept = row_scales(largest, BITS)
        if M == 1:
            codes = row_codes(y, to_codes[:, None], kept[:, None])
        else:
            codes = row_codes(y, to_codes[None, :, None], kept[None, :, None])
        tl.store(out_ptr + place, codes, mask=held)
        row = first + tl.arange(0, R)
        tl.store(scales_ptr + row, found, mask=row < rows)


def _tile(blocks: int, m: int, power: int) -> dict[str, int]:
    """The sizes of a program for rows of so many blocks of m x power."""
    blocks = triton.next_power_of_2(blocks)
    order = 1 if m == 1 else max(SLICE, triton.next_power_of_2(m))
    # a product of matrices has at least as many columns as a slice
    least = 1 if m == 1 else max(1, SLICE // (blocks * power))
    held = order * blocks * power
    rows = max(least, FEW_VALUES // held)
    return {
        "R": rows,
        "B": blocks,
        "M": order,
        "MB": min(order, SLICE),
        "P": power,
        "LOG": power.bit_length() - 1,
    }


def _values(tile: dict[str, int]) -> int:
    return tile["R"] * tile["B"] * tile["M"] * tile["P"]


def _warps(tile: dict[str, int], target: Target) -> int:
    """So many warps that a thread holds 32 values, or more where a block has no more threads."""
    # a product of matrices needs registers for its operands too
    threads = 512 if tile["M"] == 1 else 256
    return min(threads // target.warp, max(1, _values(tile) // (32 * target.warp)))


def geometry(call: Call) -> tuple[int, int, int]:
    """Width, order of the factor and order of the Sylvester matrix."""
    n = call["x"].shape[-1]
    factor = call["factor"]
    # rows that are not rotated are one block
    return (n, 1, n) if factor is None else (n, factor.shape[0], call["power"])


def refused(call: Call) -> str | None:
    """Why no kernel for rows serves a call, or None; what is wrong the definition will say."""
    x, signs, factor = call["x"], call["signs"], call["factor"]
    if x.dtype not in FLOATS:
        return f"rows of {x.dtype}; it reads float32, bfloat16 and float16"
    if x.dim() < 1 or x.shape[-1] == 0:
        return "rows without columns"
    if (signs is None) != (factor is None):
        return "a transform needs both signs and factor"
    if call.operator == "quantize_rows" and not 2 <= call["bits"] <= 8:
        return f"codes of {call['bits']} bits; it makes 2 to 8"
    if signs is None:
        return None
    n, m, power = geometry(call)
    if signs.dtype is not torch.float32 or factor.dtype is not torch.float32:
        return f"signs in {signs.dtype} and a factor in {factor.dtype}; it reads float32"
    if power < 1 or power & (power - 1) or n % (m * power) or factor.shape != (m, m):
        return f"no transform of width {n}: {tuple(factor.shape)} and {power}"
    if signs.shape != (n,):
        return f"{tuple(signs.shape)} signs for width {n}"
    if not (signs.is_contiguous() and factor.is_contiguous()):
        return "signs or a factor with gaps"
    return None


def _accepts(call: Call) -> str | None:
    if (why := refused(call)) is not None:
        return why
    n, m, power = geometry(call)
    if m > LARGEST_FACTOR:
        return f"a factor of order {m}; it multiplies by orders up to {LARGEST_FACTOR}"
    rotated = call["signs"] is not None
    padded = power if rotated else triton.next_power_of_2(n)
    values = _values(_tile(n // (m * power) if rotated else 1, m, padded))
    if values > MOST_VALUES:
        return f"a row of {n} fills {values} places; a program holds {MOST_VALUES}"
    return None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A call as kernels for rows take it: rows `[r, n]`, results to fill, 0 bits for floats."""

    rows: Tensor
    bits: int
    out: Tensor
    scales: Tensor

    @staticmethod
    def of(call: Call) -> Task:
        x = call["x"]
        bits = call["bits"] if call.operator == "quantize_rows" else 0
        out = torch.empty(x.shape, dtype=torch.int8 if bits else x.dtype, device=x.device)
        shape = (*x.shape[:-1], 1) if bits else (0,)
        return Task(flat(x), bits, out, x.new_empty(shape, dtype=torch.float32))

    @property
    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        return (self.out, self.scales) if self.bits else self.out


def _launch(call: Call):
    task, (n, m, power) = Task.of(call), geometry(call)
    rows, factor = task.rows.shape[0], call["factor"]
    if rows:
        # rows that are not rotated are one block, of which some places are empty
        power = triton.next_power_of_2(n) if factor is None else power
        blocks = 1 if factor is None else n // (m * power)
        tile = _tile(blocks, m, power)
        rows_kernel[(triton.cdiv(rows, tile["R"]),)](
            task.rows, call["signs"], factor, task.out, task.scales,
            rows, task.rows.stride(0), n, m, blocks, power**-0.5,
            ROTATE=factor is not None, BITS=task.bits, **tile,
            PRECISION=_precision(tile, call.target),
            num_warps=_warps(tile, call.target), num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return task.result


def _precision(tile: dict[str, int], target: Target) -> str:
    """How a factor is multiplied: as float32, or on tensor cores to nearly the same precision."""
    return "ieee" if tile["M"] <= SLICE or target.backend != "cuda" else "tf32x3"


def rows_cost(call: Call) -> Cost:
    x, (n, m, power) = call["x"], geometry(call)
    quantizes = call.operator == "quantize_rows"
    rows = x.numel() // n
    written = n + 4 if quantizes else n * x.element_size()
    rotates = call["factor"] is not None
    adds = n * (power.bit_length() - 1 + 2 * m) if rotates else 0
    nbytes = rows * (n * x.element_size() + written) + (4 * n if rotates else 0)
    return Cost(nbytes, rows * (adds + 2 * n * quantizes), "fp32")


# widths, orders of factors and of Sylvester matrices that models have
SHAPES = ((4096, 1, 4096), (14336, 28, 512), (11008, 172, 64), (576, 36, 16), (8192, 1, 8192))
ROWS = 4096


def _example(operator: str, n: int, m: int, power: int, bits: int, target: Target) -> Call:
    x = torch.empty(ROWS, n, dtype=torch.bfloat16, device="meta")
    signs, factor = torch.empty(n, device="meta"), torch.empty(m, m, device="meta")
    rest = (signs, factor, power)
    return Call.of(operator, (x, bits, *rest) if bits else (x, *rest), target)


def _builds(operator: str, bits: tuple[int, ...], target: Target) -> Sequence[Build]:
    found: list[Build] = []
    for n, m, power in SHAPES:
        blocks = n // (m * power)
        tile = _tile(blocks, m, power)
        # the width of codes is a constant of the code, so one shape stands for all
        for b in bits if n == SHAPES[0][0] else bits[:1]:
            found.append(
                Build(
                    label=f"{n} = {blocks} x {m} x {power}, {f'int{b}' if b else 'bf16'}",
                    function=rows_kernel,
                    signature={
                        "x_ptr": "*bf16", "signs_ptr": "*fp32", "factor_ptr": "*fp32",
                        "out_ptr": "*i8" if b else "*bf16", "scales_ptr": "*fp32",
                        "rows": "i32", "stride": "i32", "n": "i32", "m": "i32", "blocks": "i32",
                        "scale": "fp32",
                    },
                    constants={
                        "ROTATE": True, "BITS": b, **tile, "PRECISION": _precision(tile, target)
                    },
                    warps=_warps(tile, target),
                    stages=1,
                    divisible=frozenset({"rows", "stride", "n"}),
                    fusion=False,
                    cost=rows_cost(_example(operator, n, m, power, b, target)),
                    programs=triton.cdiv(ROWS, tile["R"]),
                )
            )  # fmt: skip
    return found


@final
@dataclass(frozen=True, slots=True)
class Turns:
    """Turns whose rows are asked for before their time, and programs on one multiprocessor."""

    stages: int
    resident: int


def tuning(run: Callable[[Call, Turns], Any], usual: Callable[[Target], Turns]) -> Tuning:
    """How a kernel is configured whose programs stay and take rows in turn."""

    def key(call: Call) -> str:
        x, (n, m, power) = call["x"], geometry(call)
        made = call.arguments.get("bits") or FLOATS[x.dtype]
        return f"{bucket(x.numel() // n)} x {n} = {m} x {power}, {FLOATS[x.dtype]} to {made}"

    turns = [Turns(stages, resident) for stages in (1, 2, 3, 4) for resident in (1, 2)]
    return Tuning(key, candidates=lambda _: turns, choose=lambda call: usual(call.target), run=run)


def register(
    suffix: str,
    accepts: Callable[[Call], str | None],
    serve: Callable[[Call], Any] | Tuning,
    builds: Callable[[str, tuple[int, ...], Target], Sequence[Build] | str],
    preference: int = 0,
) -> None:
    """Let one launch serve both operators on rows; `builds` takes the operator and its bits."""
    for operator, bits in (("hadamard", (0,)), ("quantize_rows", (8, 4))):
        name = f"{operator}_{suffix}"
        tuned = serve if isinstance(serve, Tuning) else None
        KERNELS.add(
            Kernel(
                name=name,
                operator=operator,
                accepts=accepts,
                launch=launch(name, serve) if isinstance(serve, Tuning) else serve,
                cost=rows_cost,
                builds=functools.partial(builds, operator, bits),
                preference=preference,
                tuning=tuned,
            )
        )


register("butterflies", _accepts, _launch, _builds)
