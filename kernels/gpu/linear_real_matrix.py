"""`linear.real` of rows: weights become 16-bit floats in registers, tensor cores do the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.matrix import block_words, load_words, multiply, store_tile
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.tiles import Tile, best, legal
from qpass._kernels.gpu.weights import (
    FLOATS,
    cost,
    has_ptx,
    linear_key,
    matrix_build,
    refuse_weight,
    rows_of,
)
from qpass._kernels.gpu.words import (
    behind,
    columns,
    pairs4,
    pairs8,
    row_offsets,
    rows_of_x,
    tile_ids,
)
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, bucket, launch


@triton.jit
def linear_real_matrix(
    x, scales, words, row_scales, group_scales, group_offsets, sums, bias, low, up, out,
    m, n, lines, groups, group_lines, width, chunks, stride, rank,
    BITS: tl.constexpr, EVEN: tl.constexpr, SPREAD: tl.constexpr, SHARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, PTX: tl.constexpr,
    TF32: tl.constexpr, SORT: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BM rows of x by BN outputs, transposed, and a share of the columns.

    `chunks` steps of BL words make a group. Words give up their columns RUN at a time: a tile of x
    has the same RUN columns of every word. SPREAD: x comes in that order. EVEN: groups end where
    steps do.
    """
    STEP: tl.constexpr = 32 // BITS
    RUN: tl.constexpr = 2
    MASKED: tl.constexpr = not (EVEN or SPREAD)
    ZERO: tl.constexpr = 2 ** (BITS - 1) if BITS == 8 or group_offsets is None else 0
    tile_m, tile_n = tile_ids(m, n, BM, BN)
    i = tile_m * BM + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    real_i = i < m
    real_j = j < n
    x += i.to(tl.int64) * stride
    words = block_words(words, tile_n, lines, BN)
    share = tl.cdiv(groups * chunks, SHARES)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, groups * chunks)
    if group_scales is not None:
        start = tl.minimum(first, groups * chunks - 1) // chunks * 16
        group_scales += row_offsets(j, groups)
        scale = tl.load(group_scales + start, mask=real_j, other=0.0)
    run = tl.arange(0, RUN * BL)
    NEXT: tl.constexpr = RUN * BL if SPREAD else RUN
    if not SPREAD and RUN < STEP:
        run = run // RUN * STEP + run % RUN
    total = tl.zeros((BN, BM), tl.float32)
    for chunk in range(first, last):
        group = chunk // chunks
        inside = chunk - group * chunks
        w = load_words(words, tile_n, n, chunk, chunks, group_lines, EVEN, BN, BL)
        step = inside * (BL * STEP) + group * width if MASKED else chunk * (BL * STEP)
        limit = (group + 1) * width
        part = total if group_scales is None else tl.zeros((BN, BM), tl.float32)
        if SORT:
            some = rows_of_x(x, step + tl.arange(0, STEP * BL), limit, real_i, MASKED)
            some = tl.reshape(some, (BM, BL, STEP // RUN, RUN))
            some = tl.trans(tl.reshape(tl.permute(some, (0, 2, 1, 3)), (BM, STEP * BL)))
            if BITS == 4:
                q0, q1, q2, q3 = pairs4(w, ZERO, x.dtype.element_ty, PTX)
                q = behind(behind(q0, q1), behind(q2, q3))
            else:
                q0, q1 = pairs8(w, x.dtype.element_ty, PTX)
                q = behind(q0, q1)
            part = tl.dot(q, some, part, input_precision="ieee")
        else:
            a0 = columns(x, step + run, limit, real_i, MASKED)
            a1 = columns(x, step + run + NEXT, limit, real_i, MASKED)
            if BITS == 4:
                a2 = columns(x, step + run + 2 * NEXT, limit, real_i, MASKED)
                a3 = columns(x, step + run + 3 * NEXT, limit, real_i, MASKED)
                q0, q1, q2, q3 = pairs4(w, ZERO, x.dtype.element_ty, PTX)
            else:
                q0, q1 = pairs8(w, x.dtype.element_ty, PTX)
            part = tl.dot(q0, a0, part, input_precision="ieee")
            part = tl.dot(q1, a1, part, input_precision="ieee")
            if BITS == 4:
                part = tl.dot(q2, a2, part, input_precision="ieee")
                part = tl.dot(q3, a3, part, input_precision="ieee")
        if group_scales is None:
            total = part
        else:
            # the next scales are asked for one step ahead
            total += part * scale.to(tl.float32)[:, None]
            ahead = tl.minimum(chunk + 1, last - 1) // chunks
            scale = tl.load(group_scales + ahead * 16, mask=real_j, other=0.0)
    store_tile(
        total, i, j, m, n, groups, row_scales, scales, group_offsets, sums, bias, low, up, rank,
        out, SHARES, TF32,
    )  # fmt: skip


def tiles_for(bits: int, scaled: bool, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles worth trying; lines are given for steps of 64 and 128 columns."""
    short, long = 64 * bits // 32, 128 * bits // 32
    if dtype is torch.float32:
        return (Tile(16, 32, 8, 4, 2, False), Tile(64, 64, 8, 8, 2, True))
    # words of 8 bits are read as fast as they come
    sorts, other = (0.05, 0.15) if bits == 8 else (0.1, 0.08)
    few = (
        Tile(16, 64, long, 4, 4, False, other),
        Tile(16, 128, long, 8, 4, False, other),
        Tile(16, 64, long, 4, 4, False, 0.8 * sorts, sort=True),
        Tile(16, 128, long, 4, 4, False, sorts, sort=True),
        Tile(32, 128, long, 4, 4, False, 0.15, sort=True),
        Tile(64, 64, long, 4, 3, True, 0.2),
        Tile(64, 128, long, 8, 3, True, 0.52 if scaled else 0.4),
    )
    if scaled:
        return (
            *few,
            Tile(64, 128, long, 4, 3, True, 0.55),
            Tile(128, 64, long, 4, 3, True, 0.55),
            Tile(128, 128, long, 8, 3, True, 0.53),
            Tile(128, 128, long, 8, 3, False, 0.53, sort=True),
        )
    return (
        *few,
        Tile(128, 128, long, 8, 3, True, 0.5),
        Tile(256, 128, short, 8, 4, True, 0.65),
    )


def _accepts(call: Call) -> str | None:
    x = call["x"]
    if x.dtype not in FLOATS:
        return f"the input is {x.dtype}"
    return refuse_weight(call, x)


def configure(packed: Packed, m: int, dtype: torch.dtype, target: Target) -> Tile:
    """The tile for m rows of x."""
    kind = "fp32" if dtype is torch.float32 else "bf16"
    tiles = tiles_for(packed.bits, packed.scaled, dtype)
    return best(tiles, target, kind, packed, m, dtype.itemsize)


def run(call: Call, tile: Tile) -> Tensor:
    """Serve a call with a given configuration."""
    x = call["x"]
    out = x.new_empty((*x.shape[:-1], call["out_features"]))
    ptx = has_ptx(call.target, x.dtype)
    return multiply(linear_real_matrix, call, x, out, tile, 2, PTX=ptx, SORT=tile.sort)


def _candidates(call: Call) -> Sequence[Tile]:
    tiles = tiles_for(call["bits"], call["group_scales"] is not None, call["x"].dtype)
    return legal(tiles, call.target, Packed.of(call), call["x"].element_size())


def _choose(call: Call) -> Tile:
    return configure(Packed.of(call), bucket(rows_of(call["x"])), call["x"].dtype, call.target)


TUNING = Tuning(
    key=lambda call: linear_key(call, call["x"]),
    candidates=_candidates,
    choose=_choose,
    run=run,
)


def _cost(call: Call) -> Cost:
    kind = "fp32" if call["x"].dtype is torch.float32 else "bf16"
    return cost(call, call["x"], call["x"].dtype, kind)


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    for m in (16, 64, 4096):
        for bits, dtype, scales, offsets in (
            (4, torch.bfloat16, True, False), (4, torch.float16, True, True),
            (8, torch.bfloat16, False, False), (4, torch.float32, True, False),
        ):  # fmt: skip
            packed = Packed(bits, 4096, 4096, 4096 * bits // 32, 32 if scales else 1, scales)
            tile = configure(packed, m, dtype, target)
            builds.append(
                matrix_build(linear_real_matrix, packed, m, tile, target, dtype, offsets=offsets)
            )
    return builds


KERNELS.add(
    Kernel(
        name="linear_real_matrix",
        operator="linear.real",
        accepts=_accepts,
        launch=launch("linear_real_matrix", TUNING),
        cost=_cost,
        builds=_builds,
        preference=10,
        tuning=TUNING,
    )
)
