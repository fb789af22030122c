"""What products of matrices with packed weights have in common, around the products themselves."""

# m rows of x, n outputs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.finish import finish
from qpass._kernels.gpu.low_rank import branch, with_branch
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.spread import spread, sums
from qpass._kernels.gpu.tiles import Tile
from qpass._kernels.gpu.weights import flat, has_tf32
from qpass._kernels.gpu.words import row_offsets
from qpass.runtime.gpu import Call


@triton.jit
def block_words(words, tile_n, lines, BN: tl.constexpr):
    """Where BN outputs have their first words, `[BN / 16, 1, 16]`."""
    block = (tile_n * (BN // 16) + tl.arange(0, BN // 16))[:, None, None]
    return words + block.to(tl.int64) * lines * 16 + tl.arange(0, 16)[None, None, :]


@triton.jit
def load_words(
    words, tile_n, n, chunk, chunks, group_lines,
    EVEN: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """The words `[BN, BL]` of a chunk: a step of BL lines, `chunks` of which make a group."""
    block = (tile_n * (BN // 16) + tl.arange(0, BN // 16))[:, None, None]
    real = block * 16 < n
    if EVEN:
        line = chunk * BL + tl.arange(0, BL)
        w = tl.load(words + line[None, :, None] * 16, mask=real, other=0)
    else:
        group = chunk // chunks
        line = (chunk - group * chunks) * BL + tl.arange(0, BL)
        there = (line < group_lines)[None, :, None]
        w = tl.load(
            words + (group * group_lines + line)[None, :, None] * 16, mask=real & there, other=0
        )
    return tl.reshape(tl.permute(w, (0, 2, 1)), (BN, BL))


@triton.jit
def shifted(total, offsets, sums, groups, real_j, real_i, TF32: tl.constexpr):
    """`total[j, i]` and, over all groups, `offsets[j, g] * sums[i, g]`.

    TF32: an offset, a float16, is a TF32 number, and two of them make a sum.
    """
    for start in range(0, groups, 16):
        g = start + tl.arange(0, 16)
        real = (g < groups)[None, :]
        offset = tl.load(offsets[:, None] + g[None, :] * 16, mask=real_j[:, None] & real, other=0)
        added = tl.load(sums[:, None] + g[None, :], mask=real_i[:, None] & real, other=0)
        offset = offset.to(tl.float32)
        if TF32:
            upper = (added.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            total = tl.dot(offset, tl.trans(upper), total, input_precision="tf32")
            total = tl.dot(offset, tl.trans(added - upper), total, input_precision="tf32")
        else:
            total = tl.dot(offset, tl.trans(added), total, input_precision="ieee")
    return total


@triton.jit
def store_tile(
    total, i, j, m, n, groups, row_scales, scales, group_offsets, sums, bias, low, up, rank, out,
    SHARES: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Store `total[j, i]`, with what offsets and a branch add, as `out[i, j]`, or a share of it."""
    real_i, real_j = i < m, j < n
    if group_offsets is not None:
        offsets = group_offsets + row_offsets(j, groups)
        here = tl.where(tl.program_id(1) == 0, groups, 0)
        added = sums + i.to(tl.int64) * groups
        total = shifted(total, offsets, added, here, real_j, real_i, TF32)
    place = i.to(tl.int64)[None, :] * n + j[:, None]
    real = real_i[None, :] & real_j[:, None]
    if SHARES > 1:
        tl.store(out + tl.program_id(1).to(tl.int64) * m * n + place, total, mask=real)
    else:
        y = total.to(tl.float32) * tl.load(row_scales + j, mask=real_j, other=0.0)[:, None]
        if scales is not None:
            y *= tl.load(scales + i, mask=real_i, other=0.0)[None, :]
        if bias is not None:
            y += tl.load(bias + j, mask=real_j, other=0.0).to(tl.float32)[:, None]
        if low is not None:
            y = with_branch(y, low, up, rank, i, j, real_i, real_j)
        tl.store(out + place, y.to(out.dtype.element_ty), mask=real)


def multiply(
    function: Any, call: Call, x: Tensor, out: Tensor, tile: Tile, run: int, **constants: object
) -> Tensor:
    """Launch a product of matrices; `function` takes `run` columns of a word at a time."""
    packed, (low, up, rank) = Packed.of(call), branch(call)
    rows = flat(x)
    m, n, shares = rows.shape[0], packed.n, tile.shares
    chunks = triton.cdiv(packed.group_lines, tile.lines)
    offsets = call["group_offsets"]
    added = None if offsets is None else sums(rows, packed.groups, packed.width)
    if tile.spread:
        parts = packed.step // run
        rows = spread(rows, packed.groups, packed.width, chunks, run, parts, tile.lines)
    scales = call.arguments.get("scales")
    scales = None if scales is None else scales.contiguous()
    # sums of integers are exact until the scales of groups come in
    exact = x.dtype is torch.int8 and call["group_scales"] is None
    kind = torch.int32 if exact else torch.float32
    target = out if shares == 1 else x.new_empty((shares, m, n), dtype=kind)
    function[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.outputs), shares)](
        rows, scales, call["weight"].view(torch.int32), call["row_scales"],
        call["group_scales"], offsets, added, call["bias"], low, up, target,
        m, n, packed.lines, packed.groups, packed.group_lines, packed.width,
        chunks, rows.stride(0), rank, BITS=packed.bits,
        EVEN=packed.width % (tile.lines * packed.step) == 0, SPREAD=tile.spread, SHARES=shares,
        BM=tile.rows, BN=tile.outputs, BL=tile.lines, TF32=has_tf32(call.target),
        num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
    if shares > 1:
        finish(target, call["row_scales"], scales, call["bias"], out, low, up)
    return out
