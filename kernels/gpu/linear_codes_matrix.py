"""`linear.codes`: integer tensor cores on codes of activations and codes of weights."""

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
    linear_key,
    matrix_build,
    refuse_weight,
    rows_of,
)
from qpass._kernels.gpu.words import codes4, codes8, columns, row_offsets, tile_ids
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, bucket, launch


@triton.jit
def linear_codes_matrix(
    x, scales, words, row_scales, group_scales, group_offsets, sums, bias, low, up, out,
    m, n, lines, groups, group_lines, width, chunks, stride, rank,
    BITS: tl.constexpr, EVEN: tl.constexpr, SPREAD: tl.constexpr, SHARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BM rows of x by BN outputs, transposed, and a share of the columns.

    `chunks` steps of BL words make a group. Words give up their columns RUN at a time: a tile of x
    has the same RUN columns of every word. SPREAD: x comes in that order. EVEN: groups end where
    steps do.
    """
    STEP: tl.constexpr = 32 // BITS
    RUN: tl.constexpr = 4
    MASKED: tl.constexpr = not (EVEN or SPREAD)
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
    total = tl.zeros((BN, BM), tl.int32 if group_scales is None else tl.float32)
    for chunk in range(first, last):
        group = chunk // chunks
        inside = chunk - group * chunks
        w = load_words(words, tile_n, n, chunk, chunks, group_lines, EVEN, BN, BL)
        step = inside * (BL * STEP) + group * width if MASKED else chunk * (BL * STEP)
        limit = (group + 1) * width
        a0 = columns(x, step + run, limit, real_i, MASKED)
        if BITS == 4:
            a1 = columns(x, step + run + NEXT, limit, real_i, MASKED)
            q0, q1 = codes4(w, group_offsets is None)
        else:
            q0 = codes8(w)
        part = total if group_scales is None else tl.zeros((BN, BM), tl.int32)
        part = tl.dot(q0, a0, part, out_dtype=tl.int32)
        if BITS == 4:
            part = tl.dot(q1, a1, part, out_dtype=tl.int32)
        if group_scales is None:
            total = part
        else:
            # the next scales are asked for one step ahead
            total += part.to(tl.float32) * scale.to(tl.float32)[:, None]
            ahead = tl.minimum(chunk + 1, last - 1) // chunks
            scale = tl.load(group_scales + ahead * 16, mask=real_j, other=0.0)
    store_tile(
        total, i, j, m, n, groups, row_scales, scales, group_offsets, sums, bias, low, up, rank,
        out, SHARES, TF32,
    )  # fmt: skip


def tiles_for(bits: int, scaled: bool) -> tuple[Tile, ...]:
    """The tiles worth trying; lines are given for steps of 128 columns."""
    long = 128 * bits // 32
    # the 4 bytes of an 8-bit word are neighbours in x as well
    apart = bits == 4
    few = (
        Tile(16, 64, long, 4, 4, False, 0.15),
        Tile(16, 128, long, 8, 4, False, 0.15),
        Tile(32, 64, long, 4, 4, False, 0.15),
        Tile(64, 64, long, 4, 4, apart, 0.4),
    )
    if scaled:
        return (
            *few,
            Tile(64, 128, long, 4, 3, apart, 0.55),
            Tile(128, 64, long, 4, 3, apart, 0.65),
            Tile(128, 128, long, 8, 3, apart, 0.63),
        )
    return (
        *few,
        Tile(64, 128, long, 8, 3, apart, 0.5),
        Tile(128, 64, long, 4, 4, apart, 0.7),
        Tile(128, 128, long, 8, 4, apart, 0.94 if apart else 0.72),
        Tile(256, 64, long, 4, 3, apart, 0.85 if apart else 0.97),
        Tile(256, 128, long, 8, 3, apart, 0.84),
    )


def _accepts(call: Call) -> str | None:
    x, scales = call["codes"], call["scales"]
    if x.dtype is not torch.int8:
        return f"the codes are {x.dtype}"
    if call["dtype"] not in FLOATS:
        return f"the result is {call['dtype']}"
    if scales.dtype is not torch.float32:
        return f"the scales are {scales.dtype}"
    if tuple(scales.shape) != (*x.shape[:-1], 1):
        return f"codes {tuple(x.shape)} do not fit scales {tuple(scales.shape)}"
    return refuse_weight(call, x)


def configure(packed: Packed, m: int, target: Target) -> Tile:
    """The tile for m rows of x."""
    tiles = tiles_for(packed.bits, packed.scaled)
    return best(tiles, target, "int8", packed, m, 1)


def run(call: Call, tile: Tile) -> Tensor:
    """Serve a call with a given configuration."""
    x = call["codes"]
    out = x.new_empty((*x.shape[:-1], call["out_features"]), dtype=call["dtype"])
    return multiply(linear_codes_matrix, call, x, out, tile, 4)


def _candidates(call: Call) -> Sequence[Tile]:
    tiles = tiles_for(call["bits"], call["group_scales"] is not None)
    return legal(tiles, call.target, Packed.of(call), call["codes"].element_size())


def _choose(call: Call) -> Tile:
    return configure(Packed.of(call), bucket(rows_of(call["codes"])), call.target)


TUNING = Tuning(
    key=lambda call: linear_key(call, call["codes"]),
    candidates=_candidates,
    choose=_choose,
    run=run,
)


def _cost(call: Call) -> Cost:
    return cost(call, call["codes"], call["dtype"], "int8")


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    for m in (16, 64, 4096):
        for bits, scales, offsets in ((8, False, False), (4, True, False), (4, True, True)):
            packed = Packed(bits, 4096, 4096, 4096 * bits // 32, 32 if scales else 1, scales)
            tile = configure(packed, m, target)
            builds.append(
                matrix_build(
                    linear_codes_matrix, packed, m, tile, target, torch.int8, offsets=offsets
                )
            )
    return builds


KERNELS.add(
    Kernel(
        name="linear_codes_matrix",
        operator="linear.codes",
        accepts=_accepts,
        launch=launch("linear_codes_matrix", TUNING),
        cost=_cost,
        builds=_builds,
        preference=10,
        tuning=TUNING,
    )
)
