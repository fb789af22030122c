"""`linear.experts`: runs of rows, each by the weight of its expert, in one launch.

Where runs end is known on the GPU only: there are as many programs as any ends could need, and each
finds its expert and its rows from the ends. The product is that of `linear_real_matrix.py`.
"""

# t rows of x, n outputs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.matrix import shifted
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.spread import sums
from qpass._kernels.gpu.tiles import Tile, fit
from qpass._kernels.gpu.weights import FLOATS, HELD, TYPES, flat, has_ptx, has_tf32
from qpass._kernels.gpu.words import (
    behind,
    pairs4,
    pairs8,
    row_offsets,
    rows_of_x,
    tile_ids,
)
from qpass.errors import BadInput
from qpass.ops.experts import check_experts
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target

# each program reads all ends
MOST_EXPERTS = 4095
# 128 columns of 4 bits, 64 of 8
LINES = 16


@triton.jit
def expert_of(ends, tile, experts, t, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile, its first row and the end of the expert's rows.

    Rows of no expert are those of one behind the last; a tile that nobody needs ends at 0.
    """
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, mask=e < experts, other=0).to(tl.int32)
    end = tl.where(e < experts, end, t)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0).to(tl.int32)
    start = tl.where(e <= experts, start, t)
    tiles = tl.cdiv(end - start, BM)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    expert = tl.sum(tl.where(mine, e, 0), 0)
    first = tl.sum(tl.where(mine, start + (tile - before) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def linear_experts(
    x, ends, words, row_scales, group_scales, group_offsets, sums, bias, out,
    t, n, lines, groups, group_lines, width, chunks, stride, experts, tiles,
    BITS: tl.constexpr, EVEN: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, PTX: tl.constexpr,
    TF32: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BM rows of x by BN outputs, transposed.

    `chunks` steps of BL words make a group. EVEN: groups end where steps do.
    """
    STEP: tl.constexpr = 32 // BITS
    RUN: tl.constexpr = 2
    ZERO: tl.constexpr = 2 ** (BITS - 1) if BITS == 8 or group_offsets is None else 0
    tile, tile_n = tile_ids(tiles * BM, n, BM, BN)
    expert, start, end = expert_of(ends, tile, experts, t, BM, EXPERTS)
    i = start + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    real_i = i < end
    real_j = j < n
    known = expert < experts
    # what lies before the weights of this expert
    rows = expert.to(tl.int64) * n
    blocks = expert.to(tl.int64) * tl.cdiv(n, 16)
    x += i.to(tl.int64) * stride
    words += blocks * lines * 16 + row_offsets(j, lines)
    if group_scales is not None:
        group_scales += blocks * groups * 16 + row_offsets(j, groups)
    total = tl.zeros((BN, BM), tl.float32)
    # nothing is read for rows of no expert, nor by a program that nobody needs
    for chunk in range(tl.where(known & (start < end), groups * chunks, 0)):
        group = chunk // chunks
        inside = chunk - group * chunks
        line = inside * BL + tl.arange(0, BL)
        if EVEN:
            line = chunk * BL + tl.arange(0, BL)
            w = tl.load(words[:, None] + line[None, :] * 16, mask=real_j[:, None], other=0)
        else:
            w = tl.load(
                words[:, None] + (group * group_lines + line)[None, :] * 16,
                mask=real_j[:, None] & (line < group_lines)[None, :], other=0,
            )  # fmt: skip
        step = inside * (BL * STEP) + group * width
        if EVEN:
            step = chunk * (BL * STEP)
        some = rows_of_x(x, step + tl.arange(0, STEP * BL), (group + 1) * width, real_i, not EVEN)
        # in the order in which words give up their columns
        some = tl.reshape(some, (BM, BL, STEP // RUN, RUN))
        some = tl.trans(tl.reshape(tl.permute(some, (0, 2, 1, 3)), (BM, STEP * BL)))
        if BITS == 4:
            q0, q1, q2, q3 = pairs4(w, ZERO, x.dtype.element_ty, PTX)
            q = behind(behind(q0, q1), behind(q2, q3))
        else:
            q0, q1 = pairs8(w, x.dtype.element_ty, PTX)
            q = behind(q0, q1)
        if group_scales is None:
            total = tl.dot(q, some, total, input_precision="ieee")
        else:
            part = tl.dot(q, some, input_precision="ieee")
            scale = tl.load(group_scales + group * 16, mask=real_j, other=0.0)
            total += part * scale.to(tl.float32)[:, None]
    if group_offsets is not None:
        offsets = group_offsets + blocks * groups * 16 + row_offsets(j, groups)
        sums += i.to(tl.int64) * groups
        here = tl.where(known & (start < end), groups, 0)
        total = shifted(total, offsets, sums, here, real_j, real_i, TF32)
    there = j < tl.where(known, n, 0)
    y = total * tl.load(row_scales + rows + j, mask=there, other=0.0)[:, None]
    if bias is not None:
        y += tl.load(bias + rows + j, mask=there, other=0.0).to(tl.float32)[:, None]
    place = i.to(tl.int64)[None, :] * n + j[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=real_i[None, :] & real_j[:, None])


def _packed(call: Call) -> Packed:
    """The sizes of the weight of one expert."""
    scales = call["group_scales"]
    return Packed(
        call["bits"],
        call["in_features"],
        call["out_features"],
        call["weight"].shape[2],
        1 if scales is None else scales.shape[2],
        scales is not None,
    )


def _tile(packed: Packed, rows: float, dtype: torch.dtype, target: Target) -> Tile:
    """The sizes of a program, for about so many rows of an expert."""
    if dtype is torch.float32:
        few = rows <= 16
        return fit(Tile(16 if few else 32, 32, 8, 4, 2, False), packed.group_lines, target)
    if rows <= 16:
        found = Tile(16, 64, LINES, 4, 4, False)
    elif rows <= 32:
        found = Tile(32, 64, LINES, 4, 4, False)
    elif rows <= 256 or target.name != "sm_90":
        found = Tile(64, 64, LINES, 4, 3, False)
    else:
        found = Tile(128, 64, LINES, 4, 3, False)
    return fit(found, packed.group_lines, target)


def _accepts(call: Call) -> str | None:
    x = call["x"]
    try:
        check_experts(
            x, call["ends"], *(call[name] for name in HELD),
            call["bits"], call["in_features"], call["out_features"],
        )  # fmt: skip
    except BadInput as error:
        return str(error)
    if x.dtype not in FLOATS:
        return f"the input is {x.dtype}"
    if call["ends"].shape[0] > MOST_EXPERTS:
        return f"{call['ends'].shape[0]} experts; each program finds its own among {MOST_EXPERTS}"
    for name in ("ends", *HELD):
        tensor = call[name]
        if tensor is None:
            continue
        if tensor.device != x.device or not tensor.is_contiguous():
            return f"{name} is on {tensor.device} or not contiguous"
        if tensor.dtype is torch.float64:
            return f"{name} is float64"
    if call["weight"].dtype is not torch.uint8:
        return f"the weight is {call['weight'].dtype}, not packed codes"
    if x.numel() == 0 or call["out_features"] == 0:
        return "there is nothing to compute"
    return None


def run(call: Call, tile: Tile) -> Tensor:
    """Serve a call with a given configuration."""
    packed, x, ends = _packed(call), flat(call["x"]), call["ends"]
    t, n, experts = x.shape[0], packed.n, ends.shape[0]
    out = x.new_empty((t, n))
    chunks = triton.cdiv(packed.group_lines, tile.lines)
    offsets = call["group_offsets"]
    added = None if offsets is None else sums(x, packed.groups, packed.width)
    # every expert, and the rows of none, may end within a tile; none has a tile without a row
    tiles = min(t, triton.cdiv(t, tile.rows) + experts)
    linear_experts[(tiles * triton.cdiv(n, tile.outputs),)](
        x, ends, call["weight"].view(torch.int32), call["row_scales"],
        call["group_scales"], offsets, added, call["bias"], out,
        t, n, packed.lines, packed.groups, packed.group_lines, packed.width,
        chunks, x.stride(0), experts, tiles, BITS=packed.bits,
        EVEN=packed.width % (tile.lines * packed.step) == 0,
        EXPERTS=triton.next_power_of_2(experts + 1),
        BM=tile.rows, BN=tile.outputs, BL=tile.lines, PTX=has_ptx(call.target, x.dtype),
        TF32=has_tf32(call.target), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _launch(call: Call) -> Tensor:
    x = call["x"]
    rows = x.shape[0] / call["ends"].shape[0]
    return run(call, _tile(_packed(call), rows, x.dtype, call.target))


def _cost(call: Call) -> Cost:
    """As if each row's expert were another, as far as there are experts."""
    x, experts = call["x"], call["ends"].shape[0]
    held = [call[name] for name in HELD if call[name] is not None]
    part = min(1.0, x.shape[0] / experts)
    moved = part * sum(tensor.numel() * tensor.element_size() for tensor in held)
    n, size = call["out_features"], x.element_size()
    kind = "fp32" if x.dtype is torch.float32 else "bf16"
    operations = 2.0 * x.shape[0] * n * call["in_features"]
    return Cost(moved + x.numel() * size + x.shape[0] * n * size, operations, kind)


def _builds(target: Target) -> Sequence[Build]:
    found: list[Build] = []
    n, k, experts = 1408, 2048, 64
    for rows in (8, 64, 512):
        for bits, dtype, scales, offsets in (
            (4, torch.bfloat16, True, False), (4, torch.float16, True, True),
            (8, torch.bfloat16, False, False),
        ):  # fmt: skip
            packed = Packed(bits, k, n, k * bits // 32, k // 128 if scales else 1, scales)
            tile, kind = _tile(packed, rows, dtype, target), TYPES[dtype]
            constants: dict[str, Any] = {
                "BITS": bits, "EVEN": True, "EXPERTS": triton.next_power_of_2(experts + 1),
                "BM": tile.rows, "BN": tile.outputs, "BL": tile.lines, "bias": None,
                "PTX": has_ptx(target, dtype), "TF32": has_tf32(target),
            }  # fmt: skip
            constants |= {} if scales else {"group_scales": None, "groups": 1}
            constants |= {} if offsets else {"group_offsets": None, "sums": None}
            signature = {
                "x": f"*{kind}", "ends": "*i32", "words": "*i32", "row_scales": "*fp32",
                "group_scales": "*fp16", "group_offsets": "*fp16", "sums": "*fp32",
                "out": f"*{kind}",
                **dict.fromkeys(
                    ("t", "n", "lines", "groups", "group_lines", "width", "chunks", "stride",
                     "experts", "tiles"), "i32",
                ),
            }  # fmt: skip
            t = rows * experts
            held = experts * n * (k * bits / 8 + 2 * packed.groups * (scales + offsets) + 4)
            moved = held + 2 * t * (n + k)
            found.append(
                Build(
                    label=f"{bits} bit {kind} {rows} of an expert"
                    f"{' scales' * scales}{' offsets' * offsets}",
                    function=linear_experts,
                    signature={a: b for a, b in signature.items() if a not in constants},
                    constants=constants,
                    warps=tile.warps,
                    stages=tile.stages,
                    mma="bf16",
                    divisible=frozenset(("n", "lines", "groups", "group_lines", "width", "stride")),
                    cost=Cost(moved, 2.0 * t * n * k, "bf16"),
                    programs=experts * -(-rows // tile.rows) * -(-n // tile.outputs),
                )
            )
    return found


KERNELS.add(
    Kernel(
        name="linear_experts",
        operator="linear.experts",
        accepts=_accepts,
        launch=_launch,
        cost=_cost,
        builds=_builds,
    )
)
