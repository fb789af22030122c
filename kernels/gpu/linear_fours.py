"""`linear_fours`: 4-bit codes of activations and of weights, on tensor cores for 4-bit integers.

Activations are packed first, in the order of the words of weights: each byte holds two columns.
Where hardware has no products of 4-bit integers, the kernel for bytes serves the operator.
"""

# m rows of x, n outputs

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

import qpass._kernels.gpu.linear_codes_matrix  # noqa: F401 what is looked up below
from qpass._kernels.gpu.fours import fours, has_hook
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.tiles import Tile, fit
from qpass._kernels.gpu.weights import flat, rows_of
from qpass._kernels.gpu.words import bytes_of, row_offsets, tile_ids
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target

# 0x88888888 as int32: what is stored raised by 8 becomes a signed code
RAISED = tl.constexpr(-0x77777778)
PLAIN = KERNELS["linear_codes_matrix"]
OLD_TRITON = "this Triton does not let its code be changed; 3.6 does"


@triton.jit
def pack_columns(x, out, stride, width, chunks, total, BL: tl.constexpr, BLOCK: tl.constexpr):
    """Fill a row of bytes: in each word of 8 columns byte j holds column j and column 4 + j.

    A group is `width` columns in `chunks` chunks of BL words; beyond its group a chunk is 0.
    """
    i = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chunk = place // (4 * BL)
    group = chunk // chunks
    inside = place % (4 * BL)
    column = (chunk - group * chunks) * (8 * BL) + inside // 4 * 8 + inside % 4
    x += i * stride + group * width + column
    there = place < total
    low = tl.load(x, mask=there & (column < width), other=0)
    high = tl.load(x + 4, mask=there & (column + 4 < width), other=0)
    tl.store(out + i * total + place, (low & 15) | (high << 4), mask=there)


@triton.jit
def linear_fours(
    x, scales, words, row_scales, group_scales, bias, out,
    m, n, lines, groups, group_lines, chunks,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BM rows of packed x by BN outputs, transposed.

    `chunks` steps of BL words make a group. NATIVE: products of bytes are compiled as products of
    4-bit integers. EVEN: groups end where steps do.
    """
    tile_m, tile_n = tile_ids(m, n, BM, BN)
    i = tile_m * BM + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    real_i = i < m
    real_j = j < n
    x += i.to(tl.int64) * (groups * chunks * (4 * BL))
    words += row_offsets(j, lines)
    if group_scales is not None:
        group_scales += row_offsets(j, groups)
    byte = tl.arange(0, 4 * BL)
    total = tl.zeros((BN, BM), tl.int32 if group_scales is None else tl.float32)
    for chunk in range(groups * chunks):
        group = chunk // chunks
        line = (chunk - group * chunks) * BL + tl.arange(0, BL)
        there = real_j[:, None]
        if not EVEN:
            there = there & (line < group_lines)[None, :]
        at = (group * group_lines + line)[None, :] * 16
        # 0, where nothing is stored, is a code that meets zeros of x
        w = bytes_of(tl.load(words[:, None] + at, mask=there, other=0) ^ RAISED)
        a = tl.load(x[:, None] + (chunk * (4 * BL) + byte)[None, :], mask=real_i[:, None], other=0)
        a = tl.trans(a)
        part = total if group_scales is None else tl.zeros((BN, BM), tl.int32)
        if NATIVE:
            part = tl.dot(w, a, part, out_dtype=tl.int32)
        else:
            part = tl.dot((w << 4) >> 4, (a << 4) >> 4, part, out_dtype=tl.int32)
            part = tl.dot(w >> 4, a >> 4, part, out_dtype=tl.int32)
        if group_scales is None:
            total = part
        else:
            scale = tl.load(group_scales + group * 16, mask=real_j, other=0.0)
            total += part.to(tl.float32) * scale.to(tl.float32)[:, None]
    y = total.to(tl.float32) * tl.load(row_scales + j, mask=real_j, other=0.0)[:, None]
    y *= tl.load(scales + i, mask=real_i, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + j, mask=real_j, other=0.0).to(tl.float32)[:, None]
    place = i.to(tl.int64)[None, :] * n + j[:, None]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=real_i[None, :] & real_j[:, None])


def _tile(packed: Packed, m: int, target: Target) -> Tile:
    lines = 16
    if m <= 16:
        found = Tile(16, 64, lines, 4, 4, False)
    elif m <= 64 or packed.scaled:
        found = Tile(64, 64, lines, 4, 4, False)
    else:
        found = Tile(128, 128, lines, 8, 3, False)
    return fit(found, packed.group_lines, target)


def _accepts(call: Call) -> str | None:
    if not call.target.has("int4"):
        return f"{call.target.name} has no products of 4-bit integers"
    if not has_hook():
        return OLD_TRITON
    if call["bits"] != 4 or call["group_offsets"] is not None:
        return "the weights are no signed integers of 4 bits"
    return PLAIN.accepts(call)


def run(call: Call, tile: Tile, *, native: bool) -> Tensor:
    """Serve a call with a given configuration."""
    packed, x = Packed.of(call), flat(call["codes"])
    m, n = x.shape[0], packed.n
    out = x.new_empty((*call["codes"].shape[:-1], n), dtype=call["dtype"])
    chunks = triton.cdiv(packed.group_lines, tile.lines)
    total = packed.groups * chunks * 4 * tile.lines
    held = x.new_empty((m, total), dtype=torch.int8)
    pack_columns[(m, triton.cdiv(total, 1024))](
        x, held, x.stride(0), packed.width, chunks, total, BL=tile.lines, BLOCK=1024
    )

    def launch() -> None:
        linear_fours[(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.outputs),)](
            held, call["scales"].contiguous(), call["weight"].view(torch.int32),
            call["row_scales"], call["group_scales"], call["bias"], out,
            m, n, packed.lines, packed.groups, packed.group_lines, chunks,
            EVEN=packed.group_lines % tile.lines == 0, BM=tile.rows, BN=tile.outputs,
            BL=tile.lines, NATIVE=native, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    if native:
        with fours():
            launch()
    else:
        launch()
    return out


def _launch(call: Call) -> Tensor:
    tile = _tile(Packed.of(call), rows_of(call["codes"]), call.target)
    # the interpreter multiplies what it is given: bytes
    return run(call, tile, native=not triton.knobs.runtime.interpret)


def _cost(call: Call) -> Cost:
    return dataclasses.replace(PLAIN.cost(call), kind="int4")


def _builds(target: Target) -> Sequence[Build] | str:
    if not target.has("int4"):
        return f"{target.name} has no products of 4-bit integers"
    found: list[Build] = []
    n = k = 4096
    for m in (16, 64, 4096):
        for scaled in (False, True):
            packed = Packed(4, k, n, k // 8, 32 if scaled else 1, scaled)
            tile = _tile(packed, m, target)
            constants: dict[str, object] = {
                "EVEN": True, "BM": tile.rows, "BN": tile.outputs, "BL": tile.lines,
                "NATIVE": True, "bias": None,
            }  # fmt: skip
            constants |= {} if scaled else {"group_scales": None, "groups": 1}
            signature = {
                "x": "*i8", "scales": "*fp32", "words": "*i32", "row_scales": "*fp32",
                "group_scales": "*fp16", "out": "*bf16",
                **dict.fromkeys(("m", "n", "lines", "groups", "group_lines", "chunks"), "i32"),
            }  # fmt: skip
            moved = n * k / 2 + m * k + 2 * m * n + 2 * n * packed.groups * scaled
            found.append(
                Build(
                    label=f"4 bit i4 m {m}{' scales' * scaled}",
                    function=linear_fours,
                    signature={a: b for a, b in signature.items() if a not in constants},
                    constants=constants,
                    warps=tile.warps,
                    stages=tile.stages,
                    mma="int4",
                    divisible=frozenset(("n", "lines", "groups", "group_lines")),
                    cost=Cost(moved, 2.0 * m * n * k, "int4"),
                    programs=-(-m // tile.rows) * -(-n // tile.outputs),
                    around=fours,
                )
            )
    return found


KERNELS.add(
    Kernel(
        name="linear_fours",
        operator="linear_fours",
        accepts=_accepts,
        launch=_launch,
        cost=_cost,
        builds=_builds,
        preference=10,
    )
)
KERNELS.add(
    dataclasses.replace(
        PLAIN,
        name="linear_fours_as_bytes",
        operator="linear_fours",
        preference=0,
        builds=lambda _: f"it is {PLAIN.name}",
    )
)
