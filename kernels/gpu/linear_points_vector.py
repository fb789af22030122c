"""`linear.points` of a few rows: codes looked up in a table, and summed where they are."""

# m rows of x, n outputs, k columns

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.linear_points import HELD, points_cost, refuse_points, sizes
from qpass._kernels.gpu.weights import FLOATS, TYPES, flat, rows_of
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, bucket, launch

# rows of x that share what is looked up, and the most that are done so
TOGETHER, MOST_ROWS = 4, 8


@triton.jit
def linear_points_vector(
    x, weight, points, row_scales, group_scales, group_offsets, bias, out,
    m, n, k, groups, width, stride,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of x and BN rows of the weight, G runs of W columns at a time.

    A run lies in one group.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    real_row = row < n
    weight += row.to(tl.int64)[:, None, None] * k
    i = tl.program_id(1) * BM
    x0 = x + i.to(tl.int64) * stride
    x1 = x + tl.minimum(i + 1, m - 1).to(tl.int64) * stride
    x2 = x + tl.minimum(i + 2, m - 1).to(tl.int64) * stride
    x3 = x + tl.minimum(i + 3, m - 1).to(tl.int64) * stride
    nothing = tl.zeros((BN, G), tl.float32)
    total0, total1, total2, total3 = nothing, nothing, nothing, nothing
    for start in range(0, k, G * W):
        run = tl.arange(0, G)
        c = start + run[:, None] * W + tl.arange(0, W)[None, :]
        there = c < k
        code = tl.load(
            weight + c[None, :, :], mask=real_row[:, None, None] & there[None, :, :], other=0
        )
        # bytes may be signed; the table is by their bits
        w = tl.load(points + (code.to(tl.int32) & 255))
        if group_scales is not None:
            first = start + run * W
            at = row.to(tl.int64)[:, None] * groups + (first // width)[None, :]
            some = real_row[:, None] & (first < k)[None, :]
            scale = tl.load(group_scales + at, mask=some, other=0.0)
            if group_offsets is not None:
                offset = tl.load(group_offsets + at, mask=some, other=0.0)
        for r in tl.static_range(BM):
            source = x0 if r == 0 else (x1 if r == 1 else (x2 if r == 2 else x3))
            v = tl.load(source + c, mask=there, other=0.0).to(tl.float32)
            part = tl.sum(w * v[None, :, :], 2)
            if group_scales is not None:
                part *= scale
                if group_offsets is not None:
                    part += offset * tl.sum(v, 1)[None, :]
            if r == 0:
                total0 += part
            elif r == 1:
                total1 += part
            elif r == 2:
                total2 += part
            else:
                total3 += part
    for r in tl.static_range(BM):
        total = total0 if r == 0 else (total1 if r == 1 else (total2 if r == 2 else total3))
        y = tl.sum(total, 1) * tl.load(row_scales + row, mask=real_row, other=0.0)
        if bias is not None:
            y += tl.load(bias + row, mask=real_row, other=0.0).to(tl.float32)
        place = (i + r).to(tl.int64) * n + row
        tl.store(out + place, y.to(out.dtype.element_ty), mask=row < tl.where(i + r < m, n, 0))


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Outputs of a program, runs of columns at a time, and warps."""

    outputs: int
    runs: int
    warps: int


# for one row, and for several, whose sums take registers too
ONE, SEVERAL = Part(8, 64, 4), Part(8, 32, 4)


def run(call: Call, part: Part) -> Tensor:
    """Serve a call with a given configuration."""
    x, (m, n, k, groups) = flat(call["x"]), sizes(call)
    width = k // groups
    columns = min(16, width & -width)
    together = 1 if m == 1 else 2 if m == 2 else TOGETHER
    out = x.new_empty((*call["x"].shape[:-1], n))
    linear_points_vector[(triton.cdiv(n, part.outputs), triton.cdiv(m, together))](
        x, *(call[name] for name in HELD), out, m, n, k, groups, width, x.stride(0),
        BM=together, BN=part.outputs, G=part.runs, W=columns,
        num_warps=part.warps * 32 // call.target.warp,
    )  # fmt: skip
    return out


def _accepts(call: Call) -> str | None:
    if (why := refuse_points(call)) is not None:
        return why
    if (rows := rows_of(call["x"])) > MOST_ROWS:
        return f"{rows} rows, and this one is for up to {MOST_ROWS}"
    return None


def _key(call: Call) -> str:
    m, n, k, groups = sizes(call)
    return f"{bucket(m)} x {k} x {n}, {groups} groups, {TYPES[call['x'].dtype]}"


TUNING = Tuning(
    key=_key,
    candidates=lambda _: [
        Part(outputs, runs, warps)
        for outputs, runs, warps in itertools.product((2, 4, 8, 16), (32, 64, 128), (2, 4, 8))
        # a thread looks up 16 to 64 values
        if 32 * warps <= outputs * runs <= 4 * 32 * warps
    ],
    choose=lambda call: ONE if rows_of(call["x"]) == 1 else SEVERAL,
    run=run,
)


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    n, k, groups = 4096, 4096, 128
    for m, part in ((1, ONE), (TOGETHER, SEVERAL)):
        for dtype in FLOATS:
            t = TYPES[dtype]
            moved = n * k + 4 * n * groups + m * (n + k) * dtype.itemsize
            builds.append(
                Build(
                    label=f"{t} m {m} scales",
                    function=linear_points_vector,
                    signature={
                        "x": f"*{t}", "weight": "*u8", "points": "*fp32", "row_scales": "*fp32",
                        "group_scales": "*fp32", "bias": f"*{t}", "out": f"*{t}",
                        **dict.fromkeys(("m", "n", "k", "groups", "width", "stride"), "i32"),
                    },
                    constants={
                        "BM": m, "BN": part.outputs, "G": part.runs, "W": 16,
                        "group_offsets": None,
                    },
                    warps=part.warps * 32 // target.warp,
                    stages=1,
                    divisible=frozenset(("n", "k", "groups", "width", "stride")),
                    cost=Cost(moved, 2.0 * m * n * k, "fp32"),
                    programs=n // part.outputs,
                )
            )  # fmt: skip
    return builds


KERNELS.add(
    Kernel(
        name="linear_points_vector",
        operator="linear.points",
        accepts=_accepts,
        launch=launch("linear_points_vector", TUNING),
        cost=points_cost,
        builds=_builds,
        preference=20,
        tuning=TUNING,
    )
)
