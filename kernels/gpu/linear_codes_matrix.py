"""`linear.codes`: integer tensor cores on codes of activations and codes of weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.finish import finish
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.tiles import Tile, best
from qpass._kernels.gpu.weights import (
    FLOATS,
    cost,
    flat,
    matrix_build,
    refuse_weight,
    rows_of,
)
from qpass._kernels.gpu.words import across, along, codes, row_offsets, tile_ids
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target


@triton.jit
def linear_codes_matrix(
    x, scales, words, row_scales, group_scales, group_offsets, bias, out,
    m, n, lines, groups, group_lines, width, chunks, stride,
    BITS: tl.constexpr, EVEN: tl.constexpr, SHARES: tl.constexpr, SWAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BM rows of x by BN outputs, and a share of the columns.

    `chunks` steps of BL lines make a group. With SWAP the tile is computed transposed.
    """
    BK: tl.constexpr = BL * (32 // BITS)
    SIGNED: tl.constexpr = BITS == 8 or group_offsets is None
    tile_m, tile_n = tile_ids(m, n, BM, BN)
    i = tile_m * BM + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    real_i = i < m
    real_j = j < n
    x += i.to(tl.int64) * stride
    words += row_offsets(j, lines)
    share = tl.cdiv(groups * chunks, SHARES)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, groups * chunks)
    if group_scales is not None:
        start = tl.minimum(first, groups * chunks - 1) // chunks * 16
        group_scales += row_offsets(j, groups)
        scale = tl.load(group_scales + start, mask=real_j, other=0.0)
        if group_offsets is not None:
            group_offsets += row_offsets(j, groups)
            offset = tl.load(group_offsets + start, mask=real_j, other=0.0)
    kind: tl.constexpr = tl.int32 if group_scales is None else tl.float32
    total = tl.zeros((BN, BM), kind) if SWAP else tl.zeros((BM, BN), kind)
    for chunk in range(first, last):
        if EVEN:
            line = chunk * BL + tl.arange(0, BL)
            k = chunk * BK + tl.arange(0, BK)
            w = tl.load(words[:, None] + line[None, :] * 16, mask=real_j[:, None], other=0)
            a = tl.load(x[:, None] + k[None, :], mask=real_i[:, None], other=0)
        else:
            group = chunk // chunks
            line = (chunk - group * chunks) * BL + tl.arange(0, BL)
            k = (chunk - group * chunks) * BK + tl.arange(0, BK)
            w = tl.load(
                words[:, None] + (group * group_lines + line)[None, :] * 16,
                mask=real_j[:, None] & (line < group_lines)[None, :], other=0,
            )  # fmt: skip
            a = tl.load(
                x[:, None] + (group * width + k)[None, :],
                mask=real_i[:, None] & (k < width)[None, :], other=0,
            )  # fmt: skip
        q = codes(w, BITS, SIGNED)
        if group_scales is None:
            if SWAP:
                total = tl.dot(q, tl.trans(a), total, out_dtype=tl.int32)
            else:
                total = tl.dot(a, tl.trans(q), total, out_dtype=tl.int32)
        else:
            # the next scales are asked for one step ahead
            now = along(scale.to(tl.float32), SWAP)
            ahead = tl.minimum(chunk + 1, last - 1) // chunks * 16
            scale = tl.load(group_scales + ahead, mask=real_j, other=0.0)
            if SWAP:
                total += tl.dot(q, tl.trans(a), out_dtype=tl.int32).to(tl.float32) * now
            else:
                total += tl.dot(a, tl.trans(q), out_dtype=tl.int32).to(tl.float32) * now
            if group_offsets is not None:
                sums = tl.sum(a.to(tl.int32), 1).to(tl.float32)
                total += across(sums, SWAP) * along(offset.to(tl.float32), SWAP)
                offset = tl.load(group_offsets + ahead, mask=real_j, other=0.0)
    place = across(i.to(tl.int64) * n, SWAP) + along(j, SWAP)
    real = across(real_i, SWAP) & along(real_j, SWAP)
    if SHARES > 1:
        tl.store(out + tl.program_id(1).to(tl.int64) * m * n + place, total, mask=real)
    else:
        y = total.to(tl.float32) * along(tl.load(row_scales + j, mask=real_j, other=0.0), SWAP)
        y *= across(tl.load(scales + i, mask=real_i, other=0.0), SWAP)
        if bias is not None:
            y += along(tl.load(bias + j, mask=real_j, other=0.0).to(tl.float32), SWAP)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=real)


def candidates(bits: int, scaled: bool) -> tuple[Tile, ...]:
    """The tiles worth trying; lines are given for steps of 128 columns."""
    long = 128 * bits // 32
    few = (
        Tile(16, 64, long, 4, 4, True),
        Tile(32, 64, long, 4, 4, True),
        Tile(64, 64, long, 4, 4, True),
    )
    if scaled:
        return (*few, Tile(64, 128, long, 8, 3, True), Tile(128, 128, long, 8, 3, True))
    return (
        *few,
        Tile(64, 128, long, 8, 3, False),
        Tile(128, 128, long, 8, 3, False),
        Tile(128, 256, long, 8, 3, False),
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


def configure(packed: Packed, m: int, target: Target) -> tuple[Tile, int]:
    """The tile, and the number of shares of the columns."""
    tiles = candidates(packed.bits, packed.scaled)
    return best("linear_codes_matrix", tiles, target, "int8", packed, m, 1)


def run(call: Call, tile: Tile, shares: int) -> Tensor:
    """Serve a call with a given configuration."""
    packed = Packed.of(call)
    x = flat(call["codes"])
    scales = call["scales"].contiguous()
    m, n = x.shape[0], packed.n
    out = x.new_empty((*call["codes"].shape[:-1], n), dtype=call["dtype"])
    kind = torch.int32 if call["group_scales"] is None else torch.float32
    target = out if shares == 1 else x.new_empty((shares, m, n), dtype=kind)
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.outputs)
    linear_codes_matrix[(tiles, shares)](
        x, scales, call["weight"].view(torch.int32), call["row_scales"],
        call["group_scales"], call["group_offsets"], call["bias"], target,
        m, n, packed.lines, packed.groups, packed.group_lines, packed.width,
        triton.cdiv(packed.group_lines, tile.lines), x.stride(0),
        BITS=packed.bits, EVEN=packed.width % (tile.lines * packed.step) == 0, SHARES=shares,
        SWAP=tile.swap, BM=tile.rows, BN=tile.outputs, BL=tile.lines,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if shares > 1:
        finish(target, call["row_scales"], scales, call["bias"], out)
    return out


def _launch(call: Call) -> Tensor:
    return run(call, *configure(Packed.of(call), rows_of(call["codes"]), call.target))


def _cost(call: Call) -> Cost:
    return cost(call, call["codes"], call["dtype"], "int8")


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    for m in (16, 64, 4096):
        for bits, scales, offsets in ((8, False, False), (4, True, False), (4, True, True)):
            packed = Packed(bits, 4096, 4096, 4096 * bits // 32, 32 if scales else 1, scales)
            tile, _ = configure(packed, m, target)
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
        launch=_launch,
        cost=_cost,
        builds=_builds,
        preference=10,
    )
)
