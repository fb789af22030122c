"""`linear.blocks`: products of 4-bit floats in blocks, MXFP4 and NVFP4.

Hardware for them (sm_100, sm_120, gfx950) takes codes and scales as they lie in memory: Triton puts
the scales where its instructions want them. Elsewhere codes times scales become bfloat16, which is
exact, and the product is one of bfloat16. Sums are float32 either way.
"""

# m rows of x, n outputs, k columns, two to a byte

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.e2m1 import e2m1_numbers, scale_numbers
from qpass._kernels.gpu.finish import finish
from qpass._kernels.gpu.weights import FLOATS, flat, rows_of
from qpass._kernels.gpu.words import tile_ids
from qpass.errors import BadInput
from qpass.ops.blocks import check_blocks
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target

NAMES = (
    "codes", "scales", "row_scales", "weight", "weight_scales", "weight_row_scales", "bias",
    "scale_format",
)  # fmt: skip
# columns that share a scale, by the format of the scales
GROUPS = {"e8m0": 32, "e4m3": 16}


@triton.jit
def numbers(codes, scales, E4M3: tl.constexpr):
    """Codes `[R, K / 2]` times scales `[R, G]` as bfloat16 `[R, K]`."""
    R: tl.constexpr = codes.shape[0]
    HALF: tl.constexpr = codes.shape[1]
    G: tl.constexpr = scales.shape[1]
    wide = codes.to(tl.int32)
    low, high = e2m1_numbers(wide & 15), e2m1_numbers(wide >> 4)
    both = tl.reshape(tl.join(low, high), (R, G, 2 * HALF // G))
    both *= scale_numbers(scales.to(tl.int32), E4M3)[:, :, None]
    return tl.reshape(both, (R, 2 * HALF)).to(tl.bfloat16)


@triton.jit
def bytes_at(rows, at, there, end, EVEN: tl.constexpr):
    """Bytes `at` of each row; 0 from `end` on."""
    if EVEN:
        return tl.load(rows[:, None] + at[None, :], mask=there[:, None], other=0)
    return tl.load(rows[:, None] + at[None, :], mask=there[:, None] & (at < end)[None, :], other=0)


@triton.jit
def linear_blocks(
    x, x_scales, x_rows, w, w_scales, w_rows, bias, out,
    m, n, half, groups,
    E4M3: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr, SHARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BN outputs by BM rows of x, transposed, and a share of the columns.

    EVEN: steps end where columns do. NATIVE: the product takes codes and scales as they are.
    """
    tile_m, tile_n = tile_ids(m, n, BM, BN)
    i = tile_m * BM + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    real_i = i < m
    real_j = j < n
    x += i.to(tl.int64) * half
    w += j.to(tl.int64) * half
    x_scales += i.to(tl.int64) * groups
    w_scales += j.to(tl.int64) * groups
    byte = tl.arange(0, BK // 2)
    group = tl.arange(0, BK // L)
    steps = tl.cdiv(half, BK // 2)
    share = tl.cdiv(steps, SHARES)
    first = tl.program_id(1) * share
    total = tl.zeros((BN, BM), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        at, scale_at = step * (BK // 2) + byte, step * (BK // L) + group
        a = bytes_at(w, at, real_j, half, EVEN)
        b = bytes_at(x, at, real_i, half, EVEN)
        # a scale of 0 is a number like any other where codes are 0
        a_scale = bytes_at(w_scales, scale_at, real_j, groups, EVEN)
        b_scale = bytes_at(x_scales, scale_at, real_i, groups, EVEN)
        if NATIVE:
            if E4M3:
                a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
                b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
            total = tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1", total)
        else:
            left = numbers(a, a_scale, E4M3)
            total = tl.dot(left, tl.trans(numbers(b, b_scale, E4M3)), total)
    place = i.to(tl.int64)[None, :] * n + j[:, None]
    real = real_i[None, :] & real_j[:, None]
    if SHARES > 1:
        tl.store(out + tl.program_id(1).to(tl.int64) * m * n + place, total, mask=real)
    else:
        y = total * tl.load(w_rows + j, mask=real_j, other=0.0)[:, None]
        y *= tl.load(x_rows + i, mask=real_i, other=0.0)[None, :]
        if bias is not None:
            y += tl.load(bias + j, mask=real_j, other=0.0).to(tl.float32)[:, None]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=real)


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of x by outputs by columns, how Triton runs it, and shares of the columns."""

    rows: int
    outputs: int
    columns: int
    warps: int
    stages: int
    shares: int = 1


def native(target: Target, scale_format: str) -> bool:
    """Whether a product takes such blocks as they are."""
    # Triton has products scaled by E4M3 for NVIDIA hardware only
    return target.has("fp4") and (scale_format == "e8m0" or target.backend == "cuda")


def tile(m: int, n: int, k: int, scale_format: str, target: Target) -> Tile:
    """The sizes of a program, and enough of them to fill the GPU."""
    direct, hip = native(target, scale_format), target.backend == "hip"
    rows = 16 if m <= 16 else 64 if m <= 64 else 128
    stages = 2 if hip else 4 if m <= 64 else 3
    if direct:
        # hardware for blocks wants 128 outputs on sm_100, and one warp for each 32 of them
        warps = 4 if m <= 64 or target.name == "sm_100" else 8
        found = Tile(rows, 128, 128 if hip and m > 64 else 256, warps, stages)
    elif m > 64:
        # where warps multiply by themselves, what they decode fills their registers
        found = Tile(rows if target.name == "sm_90" else 64, 128, 64, 8, stages)
    else:
        found = Tile(rows, 64, 128 if m <= 16 else 64, 4, stages)
    programs = -(-m // found.rows) * -(-n // found.outputs)
    shares = 1
    while programs * shares * 2 <= target.multiprocessors and shares * 4 * found.columns <= k:
        shares *= 2
    return Tile(found.rows, found.outputs, found.columns, found.warps, found.stages, shares)


def _accepts(call: Call) -> str | None:
    codes = call["codes"]
    try:
        check_blocks(*(call[name] for name in NAMES))
    except BadInput as error:
        return str(error)
    if call["dtype"] not in FLOATS:
        return f"the result is {call['dtype']}"
    n, half = call["weight"].shape
    if codes.numel() == 0 or n == 0:
        return "there is nothing to compute"
    group = 2 * half // call["weight_scales"].shape[1]
    if GROUPS[call["scale_format"]] != group:
        return f"blocks of {group} by {call['scale_format']}; it multiplies those of hardware"
    for name in NAMES[:-1]:
        tensor = call[name]
        if tensor is None:
            continue
        if tensor.device != codes.device or not tensor.is_contiguous():
            return f"{name} is on {tensor.device} or not contiguous"
        if tensor.dtype is torch.float64:
            return f"{name} is float64"
    return None


def run(call: Call, found: Tile) -> Tensor:
    """Serve a call with a given configuration."""
    codes, weight = flat(call["codes"]), call["weight"]
    (m, half), n, groups = codes.shape, weight.shape[0], call["weight_scales"].shape[1]
    out = torch.empty((*call["codes"].shape[:-1], n), dtype=call["dtype"], device=codes.device)
    shares, scales = found.shares, call["scale_format"]
    to = out if shares == 1 else codes.new_empty((shares, m, n), dtype=torch.float32)
    grid = (triton.cdiv(m, found.rows) * triton.cdiv(n, found.outputs), shares)
    linear_blocks[grid](
        codes, call["scales"], call["row_scales"], weight, call["weight_scales"],
        call["weight_row_scales"], call["bias"], to, m, n, half, groups,
        E4M3=scales == "e4m3", L=2 * half // groups, EVEN=2 * half % found.columns == 0,
        SHARES=shares, BM=found.rows, BN=found.outputs, BK=found.columns,
        NATIVE=native(call.target, scales), num_warps=found.warps, num_stages=found.stages,
    )  # fmt: skip
    if shares > 1:
        finish(to, call["weight_row_scales"], call["row_scales"], call["bias"], out)
    return out


def _launch(call: Call) -> Tensor:
    n, half = call["weight"].shape
    m = rows_of(call["codes"])
    return run(call, tile(m, n, 2 * half, call["scale_format"], call.target))


def _cost(call: Call) -> Cost:
    n, half = call["weight"].shape
    m = rows_of(call["codes"])
    given = [call[name] for name in NAMES[:-1] if call[name] is not None]
    moved = sum(t.numel() * t.element_size() for t in given) + m * n * call["dtype"].itemsize
    kind = "fp4" if native(call.target, call["scale_format"]) else "bf16"
    return Cost(moved, 4.0 * m * n * half, kind)


def _builds(target: Target) -> Sequence[Build]:
    found: list[Build] = []
    n = k = 4096
    for m in (16, 64, 4096):
        for scales, group in GROUPS.items():
            made = tile(m, n, k, scales, target)
            direct = native(target, scales)
            # sums of shares are added up by another kernel
            constants: dict[str, Any] = {
                "E4M3": scales == "e4m3", "L": group, "EVEN": True, "SHARES": 1, "BM": made.rows,
                "BN": made.outputs, "BK": made.columns, "NATIVE": direct, "bias": None,
            }  # fmt: skip
            moved = (m + n) * (k / 2 + k / group + 4) + 2 * m * n
            found.append(
                Build(
                    label=f"m {m}, e2m1 / {group} / {scales}",
                    function=linear_blocks,
                    signature={
                        **dict.fromkeys(("x", "x_scales", "w", "w_scales"), "*u8"),
                        **dict.fromkeys(("x_rows", "w_rows"), "*fp32"), "out": "*bf16",
                        **dict.fromkeys(("m", "n", "half", "groups"), "i32"),
                    },
                    constants=constants,
                    warps=made.warps,
                    stages=made.stages,
                    mma="fp4" if direct else "bf16",
                    divisible=frozenset(("n", "half", "groups")),
                    cost=Cost(moved, 2.0 * m * n * k, "fp4" if direct else "bf16"),
                    programs=-(-m // made.rows) * -(-n // made.outputs),
                )
            )  # fmt: skip
    return found


KERNELS.add(
    Kernel(
        name="linear_blocks",
        operator="linear.blocks",
        accepts=_accepts,
        launch=_launch,
        cost=_cost,
        builds=_builds,
    )
)
