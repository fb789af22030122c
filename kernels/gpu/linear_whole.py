"""`linear.real` and `linear.points` of many rows: weights written out, and a product of torch's.

Weights become 16-bit floats, `row_scales * (group_scales * code + group_offsets)` rounded once. So
many of them at a time that they stay in the cache until the library's product has read them.
"""

# n outputs, k columns

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.linear_points import points_cost, refuse_points, sizes
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.weights import TYPES, cost, flat, linear_key, refuse_weight, rows_of
from qpass._kernels.gpu.words import column
from qpass.ops.packing import ROWS
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, launch

HALVES = (torch.bfloat16, torch.float16)
# fewer rows are not worth writing the weights out
FEWEST_ROWS = 384
# bytes of weights that are written out at a time
AT_ONCE = 64 << 20
LINES = 64
# the same of points, which no other kernel does as fast
FEWEST_POINTS = 9
OUTPUTS, COLUMNS = 8, 256
WARPS = 4


@triton.jit
def unpack_words(
    words, row_scales, group_scales, group_offsets, out,
    first, n, k, lines, groups, group_lines, width,
    BITS: tl.constexpr, EVEN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """One program: BL lines of a block of 16 rows, as numbers `out[row - 16 * first, column]`.

    EVEN: groups end where lines end.
    """
    STEP: tl.constexpr = 32 // BITS
    ZERO: tl.constexpr = 2 ** (BITS - 1) if BITS == 8 or group_offsets is None else 0
    block = first + tl.program_id(0)
    rows = tl.arange(0, 16)
    line = tl.program_id(1) * BL + tl.arange(0, BL)
    real = (line < lines)[None, :]
    source = block.to(tl.int64) * lines * 16 + line[None, :] * 16 + rows[:, None]
    w = tl.load(words + source, mask=real, other=0)
    row = block * 16 + rows
    by_row = tl.load(row_scales + row, mask=row < n, other=0.0)
    c0, c1 = column(w, BITS, 0, ZERO), column(w, BITS, 1, ZERO)
    c2, c3 = column(w, BITS, 2, ZERO), column(w, BITS, 3, ZERO)
    values = tl.join(tl.join(c0, c1), tl.join(c2, c3))
    if BITS == 4:
        c4, c5 = column(w, BITS, 4, ZERO), column(w, BITS, 5, ZERO)
        c6, c7 = column(w, BITS, 6, ZERO), column(w, BITS, 7, ZERO)
        values = tl.join(values, tl.join(tl.join(c4, c5), tl.join(c6, c7)))
        values = tl.permute(values, (0, 1, 4, 3, 2))
    else:
        values = tl.permute(values, (0, 1, 3, 2))
    values = tl.reshape(values, (16, BL, STEP))
    if group_scales is not None:
        at = block.to(tl.int64) * groups * 16 + (line // group_lines)[None, :] * 16 + rows[:, None]
        scale = tl.load(group_scales + at, mask=real, other=0.0).to(tl.float32) * by_row[:, None]
        values *= scale[:, :, None]
        if group_offsets is not None:
            offset = tl.load(group_offsets + at, mask=real, other=0.0).to(tl.float32)
            values += (offset * by_row[:, None])[:, :, None]
    else:
        values *= by_row[:, None, None]
    values = tl.reshape(values, (16, BL * STEP))
    place = tl.program_id(1) * (BL * STEP) + tl.arange(0, BL * STEP)
    held = place < k
    if not EVEN:
        at_line = place // STEP
        group = at_line // group_lines
        inside = (at_line - group * group_lines) * STEP + place % STEP
        held = (inside < width) & (group < groups)
        place = group * width + inside
    here = (tl.program_id(0) * 16 + rows).to(tl.int64) * k
    real = (row < n)[:, None] & held[None, :]
    tl.store(out + here[:, None] + place[None, :], values.to(out.dtype.element_ty), mask=real)


@triton.jit
def unpack_points(
    weight, points, row_scales, group_scales, group_offsets, out,
    first, n, k, groups, width, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BK columns of BN rows, as numbers `out[row - first, column]`."""
    here = tl.program_id(0) * BN + tl.arange(0, BN)
    row = first + here
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    real = (row < n)[:, None] & (c < k)[None, :]
    at = row.to(tl.int64)[:, None]
    code = tl.load(weight + at * k + c[None, :], mask=real, other=0)
    # bytes may be signed; the table is by their bits
    values = tl.load(points + (code.to(tl.int32) & 255))
    if group_scales is not None:
        of = at * groups + (c // width)[None, :]
        values *= tl.load(group_scales + of, mask=real, other=0.0)
        if group_offsets is not None:
            values += tl.load(group_offsets + of, mask=real, other=0.0)
    values *= tl.load(row_scales + row, mask=row < n, other=0.0)[:, None]
    to = here.to(tl.int64)[:, None] * k + c[None, :]
    tl.store(out + to, values.to(out.dtype.element_ty), mask=real)


def products(
    x: Tensor, n: int, out: Tensor, unpack: Callable[[Tensor, int, int], None], at_once: int
) -> None:
    """Fill `out [m, n]` from x `[m, k]`; `unpack(to, a, b)` writes the weights' rows a to b."""
    k = x.shape[1]
    step = max(ROWS, at_once // (k * x.element_size()) // ROWS * ROWS)
    scratch = torch.empty((min(n, step), k), dtype=x.dtype, device=x.device)
    for a in range(0, n, step):
        b = min(n, a + step)
        unpack(scratch, a, b)
        torch.mm(x, scratch[: b - a].t(), out=out[:, a:b])


@final
@dataclass(frozen=True, slots=True)
class Portion:
    """Bytes of weights that are written out at a time, by programs of so many lines and warps."""

    at_once: int
    lines: int
    warps: int


def run(call: Call, portion: Portion) -> Tensor:
    """Serve a call of `linear.real` with a given configuration."""
    packed = Packed.of(call)
    x, lines = flat(call["x"]), portion.lines
    n, k = packed.n, packed.k
    out = x.new_empty((x.shape[0], n))
    words = call["weight"].view(torch.int32)

    def unpack(to: Tensor, a: int, b: int) -> None:
        grid = (triton.cdiv(b - a, ROWS), triton.cdiv(packed.lines, lines))
        unpack_words[grid](
            words, call["row_scales"], call["group_scales"], call["group_offsets"], to,
            a // ROWS, b, k, packed.lines, packed.groups, packed.group_lines, packed.width,
            BITS=packed.bits, EVEN=packed.width % packed.step == 0, BL=lines,
            num_warps=portion.warps * 32 // call.target.warp,
        )  # fmt: skip

    products(x, n, out, unpack, portion.at_once)
    return finished(call, out)


def finished(call: Call, out: Tensor) -> Tensor:
    """The result in the shape of x, with the bias."""
    if call["bias"] is not None:
        out += call["bias"]
    return out.reshape(*call["x"].shape[:-1], out.shape[1])


def run_points(call: Call) -> Tensor:
    """Serve a call of `linear.points`."""
    x, (_, n, k, groups) = flat(call["x"]), sizes(call)
    out = x.new_empty((x.shape[0], n))

    def unpack(to: Tensor, a: int, b: int) -> None:
        unpack_points[(triton.cdiv(b - a, OUTPUTS), triton.cdiv(k, COLUMNS))](
            call["weight"], call["points"], call["row_scales"], call["group_scales"],
            call["group_offsets"], to,
            a, b, k, groups, k // groups, BN=OUTPUTS, BK=COLUMNS, num_warps=WARPS,
        )  # fmt: skip

    products(x, n, out, unpack, AT_ONCE)
    return finished(call, out)


def too_few(x: Tensor, fewest: int = FEWEST_ROWS) -> str | None:
    """Why a call is not worth writing weights out for, or None."""
    if x.dtype not in HALVES:
        return f"the input is {x.dtype}; weights become 16-bit floats"
    if rows_of(x) < fewest:
        return f"{rows_of(x)} rows; writing out the weights is worth {fewest}"
    return None


def _accepts(call: Call) -> str | None:
    return too_few(call["x"]) or refuse_weight(call, call["x"])


def _cost(call: Call) -> Cost:
    return cost(call, call["x"], call["x"].dtype, "bf16")


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    n, k = 4096, 4096
    for bits, dtype, scales, offsets in (
        (4, torch.bfloat16, True, False), (4, torch.float16, True, True),
        (8, torch.bfloat16, False, False),
    ):  # fmt: skip
        lines = k * bits // 32
        constants: dict[str, object] = {"BITS": bits, "EVEN": True, "BL": LINES}
        constants |= {} if scales else {"group_scales": None}
        constants |= {} if offsets else {"group_offsets": None}
        signature = {
            "words": "*i32", "row_scales": "*fp32", "group_scales": "*fp16",
            "group_offsets": "*fp16", "out": f"*{TYPES[dtype]}",
            **dict.fromkeys(
                ("first", "n", "k", "lines", "groups", "group_lines", "width"), "i32"
            ),
        }  # fmt: skip
        builds.append(
            Build(
                label=f"{bits} bit {TYPES[dtype]}{' scales' * scales}{' offsets' * offsets}",
                function=unpack_words,
                signature={name: kind for name, kind in signature.items() if name not in constants},
                constants=constants,
                warps=WARPS * 32 // target.warp,
                stages=1,
                divisible=frozenset(("n", "k", "lines", "groups", "group_lines", "width")),
                cost=Cost(n * k * (bits / 8 + 2), 2.0 * n * k, "fp32"),
                programs=n // ROWS * triton.cdiv(lines, LINES),
            )
        )
    return builds


TUNING = Tuning(
    key=lambda call: linear_key(call, call["x"]),
    candidates=lambda _: [
        Portion(at_once << 20, lines, warps)
        for at_once in (32, 64, 256)
        for lines, warps in ((32, 4), (64, 4), (64, 8))
    ],
    choose=lambda _: Portion(AT_ONCE, LINES, WARPS),
    run=run,
)


KERNELS.add(
    Kernel(
        name="linear_real_whole",
        operator="linear.real",
        accepts=_accepts,
        launch=launch("linear_real_whole", TUNING),
        cost=_cost,
        builds=_builds,
        preference=30,
        tuning=TUNING,
    )
)


def _accepts_points(call: Call) -> str | None:
    return too_few(call["x"], FEWEST_POINTS) or refuse_points(call)


def _points_builds(target: Target) -> Sequence[Build] | str:
    n, k, groups = 4096, 4096, 128
    return [
        Build(
            label=f"{TYPES[dtype]} scales",
            function=unpack_points,
            signature={
                "weight": "*u8", "points": "*fp32", "row_scales": "*fp32", "group_scales": "*fp32",
                "out": f"*{TYPES[dtype]}",
                **dict.fromkeys(("first", "n", "k", "groups", "width"), "i32"),
            },
            constants={"BN": OUTPUTS, "BK": COLUMNS, "group_offsets": None},
            warps=WARPS * 32 // target.warp,
            stages=1,
            divisible=frozenset(("n", "k", "groups", "width")),
            cost=Cost(n * k * 3 + 4 * n * groups, 2.0 * n * k, "fp32"),
            programs=n // OUTPUTS * (k // COLUMNS),
        )
        for dtype in HALVES
    ]  # fmt: skip


KERNELS.add(
    Kernel(
        name="linear_points_whole",
        operator="linear.points",
        accepts=_accepts_points,
        launch=run_points,
        cost=points_cost,
        builds=_points_builds,
        preference=30,
    )
)
