"""`linear.real` of a few rows: integers times vectors, as fast as the weights arrive."""

# m rows of x, n outputs

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.finish import finish
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.weights import FLOATS, cost, flat, linear_key, refuse_weight, rows_of
from qpass._kernels.gpu.words import column
from qpass.ops.packing import ROWS
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target
from qpass.runtime.tuned import Tuning, bucket, launch

# rows of x that share what is made of the words
MOST_ROWS = 2
# what two values of x in one int32 may be
PAIRS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def two(pairs, KIND: tl.constexpr):
    """The lower and the upper 16-bit float of each int32, as float32."""
    if tl.bfloat16 == KIND:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _row(
    products, sums, x, w, line, real, group_lines, width,
    BITS: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr, ZERO: tl.constexpr, nought,
):  # fmt: skip
    """The products of words `[BL, BN]` with their columns of one row of x, and the row's sums."""
    STEP: tl.constexpr = 32 // BITS
    if PAIRS is not None:
        for h in tl.static_range(STEP // 2):
            low, high = two(tl.load(x + line * (STEP // 2) + h, mask=real), PAIRS)
            products += column(w, BITS, 2 * h, ZERO, nought) * low[:, None]
            products += column(w, BITS, 2 * h + 1, ZERO, nought) * high[:, None]
            sums += low + high
    else:
        group = line // group_lines
        inside = (line - group * group_lines) * STEP
        source = x + line * STEP if EVEN else x + group * width + inside
        for j in tl.static_range(STEP):
            there = real
            if not EVEN:
                there = (inside + j < width) if real is None else real & (inside + j < width)
            v = tl.load(source + j, mask=there, other=None if there is None else 0.0)
            v = v.to(tl.float32)
            products += column(w, BITS, j, ZERO, nought) * v[:, None]
            sums += v
    return products, sums


@triton.jit
def _store(total, out, i, m, n, row, row_scales, bias, SHARES: tl.constexpr):
    y = tl.sum(total, 0)
    if SHARES > 1:
        tl.store(out + (tl.program_id(1) * m + i) * n + row, y, mask=row < n)
    else:
        y *= tl.load(row_scales + row, mask=row < n, other=0.0)
        if bias is not None:
            y += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
        tl.store(out + i * n + row, y.to(out.dtype.element_ty), mask=row < n)


@triton.jit
def linear_real_vector(
    x, words, row_scales, group_scales, group_offsets, bias, out,
    n, lines, groups, width, stride,
    BITS: tl.constexpr, GROUP_LINES: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
    WHOLE: tl.constexpr, SHARES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of x, BN rows of a block of weights and a share of its lines.

    It takes BL lines at a time. EVEN: groups end where lines end. WHOLE: so do shares. PAIRS is
    the type of x where it comes as int32, two values each, and None where it comes as it is. AHEAD:
    words are asked for one step before their time.
    """
    PIECES: tl.constexpr = 16 // BN
    ZERO: tl.constexpr = 2 ** (BITS - 1) if BITS == 8 or group_offsets is None else 0
    block = tl.program_id(0) // PIECES
    rows = tl.program_id(0) % PIECES * BN + tl.arange(0, BN)
    nought = n >> 31
    share = tl.cdiv(tl.cdiv(lines, BL), SHARES) * BL
    first = tl.program_id(1) * share
    last = first + share if WHOLE else tl.minimum(first + share, lines)
    words += block.to(tl.int64) * lines * 16
    nothing = tl.zeros((BL, BN), tl.float32)
    none = tl.zeros((BL,), tl.float32)
    total0, total1 = nothing, nothing
    if AHEAD:
        line = first + tl.arange(0, BL)
        ahead = tl.load(words + line[:, None] * 16 + rows[None, :], mask=(line < last)[:, None])
    for start in range(first, last, BL):
        line = start + tl.arange(0, BL)
        real = None if WHOLE else line < last
        reals = None if WHOLE else real[:, None]
        if AHEAD:
            w = ahead
            soon = line + BL
            ahead = tl.load(words + soon[:, None] * 16 + rows[None, :], mask=(soon < last)[:, None])
        else:
            w = tl.load(words + line[:, None] * 16 + rows[None, :], mask=reals)
        if group_scales is not None:
            at = (block * groups + line // GROUP_LINES)[:, None] * 16 + rows[None, :]
            scale = tl.load(group_scales + at, mask=reals)
            if group_offsets is not None:
                offset = tl.load(group_offsets + at, mask=reals)
        for r in tl.static_range(BM):
            products, sums = _row(
                nothing, none, x + r * stride, w, line, real, GROUP_LINES, width,
                BITS, EVEN, PAIRS, ZERO, nought,
            )  # fmt: skip
            if group_scales is not None:
                products *= scale.to(tl.float32)
                if group_offsets is not None:
                    products += offset.to(tl.float32) * sums[:, None]
            if not WHOLE:
                products = tl.where(reals, products, 0.0)
            if r == 0:
                total0 += products
            else:
                total1 += products
    row = block * 16 + rows
    _store(total0, out, 0, BM, n, row, row_scales, bias, SHARES)
    if BM > 1:
        _store(total1, out, 1, BM, n, row, row_scales, bias, SHARES)


def _accepts(call: Call) -> str | None:
    x = call["x"]
    if x.dtype not in FLOATS:
        return f"the input is {x.dtype}"
    if (why := refuse_weight(call, x)) is not None:
        return why
    if rows_of(x) > MOST_ROWS:
        return f"{rows_of(x)} rows, and this one is for up to {MOST_ROWS}"
    return None


@final
@dataclass(frozen=True, slots=True)
class Share:
    """What a program does: outputs of a block, lines at a time, one of `shares` of all lines."""

    outputs: int
    lines: int
    warps: int
    shares: int
    ahead: bool = False


def configure(packed: Packed, m: int, target: Target) -> Share:
    """The share of a program, for m rows of x."""
    blocks, many = -(-packed.n // ROWS), target.multiprocessors
    if m > 1:
        if blocks >= 3 * many:
            return Share(ROWS, 64, 4, 1)
        return Share(ROWS, 128, 16, 1) if blocks >= many else Share(ROWS // 2, 128, 8, 1)
    if blocks >= 3 * many:
        few = packed.bits == 4 and packed.lines < 1024
        return Share(ROWS, 64, 4, 1, ahead=True) if few else Share(ROWS, 256, 16, 1)
    if packed.lines < 256:
        return Share(ROWS, 64, 4, 1)
    # 16 warps on each multiprocessor keep enough loads in the air
    if blocks >= many and packed.lines < 1024:
        return Share(ROWS, 128, 16, 1)
    if blocks >= many:
        return Share(ROWS, 256, 16, 1, ahead=True)
    # as many programs as multiprocessors, or columns are shared
    shares = 1 if 4 * blocks >= many else 2 if packed.lines < 2048 else 4
    return Share(ROWS // 2, 256, 16, shares)


def run(call: Call, share: Share) -> Tensor:
    """Serve a call with a given configuration."""
    weight = call["weight"]
    packed = Packed.of(call)
    x = flat(call["x"])
    m, n, shares = x.shape[0], packed.n, share.shares
    out = x.new_empty((*call["x"].shape[:-1], n))
    target = out if shares == 1 else x.new_empty((shares, m, n), dtype=torch.float32)
    even = packed.width % packed.step == 0
    pairs = PAIRS.get(x.dtype) if even and x.storage_offset() % 2 == 0 else None
    if pairs is not None and x.stride(0) % 2:
        x = x.contiguous()
    held = x if pairs is None else x.view(torch.int32)
    pieces = weight.shape[0] * (ROWS // share.outputs)
    linear_real_vector[(pieces, shares)](
        held, weight.view(torch.int32), call["row_scales"],
        call["group_scales"], call["group_offsets"], call["bias"], target,
        n, packed.lines, packed.groups, packed.width, held.stride(0),
        BITS=packed.bits, GROUP_LINES=packed.group_lines, EVEN=even, PAIRS=pairs,
        WHOLE=packed.lines % (share.lines * shares) == 0, SHARES=shares,
        BM=m, BN=share.outputs, BL=share.lines, AHEAD=share.ahead,
        num_warps=share.warps * 32 // call.target.warp,
    )  # fmt: skip
    if shares > 1:
        finish(target, call["row_scales"], None, call["bias"], out)
    return out


def candidates(call: Call) -> Sequence[Share]:
    """The shares worth timing."""
    packed = Packed.of(call)
    return [
        Share(outputs, lines, warps, shares, ahead)
        for outputs, lines, warps, shares, ahead in itertools.product(
            (ROWS // 2, ROWS), (64, 128, 256), (4, 8, 16), (1, 2, 4), (False, True)
        )
        # a thread holds 4 to 16 words
        if 4 * 32 * warps <= outputs * lines <= 16 * 32 * warps and lines * shares <= packed.lines
    ]


TUNING = Tuning(
    key=lambda call: linear_key(call, call["x"]),
    candidates=candidates,
    choose=lambda call: configure(Packed.of(call), bucket(rows_of(call["x"])), call.target),
    run=run,
)


def _cost(call: Call) -> Cost:
    return cost(call, call["x"], call["x"].dtype, "fp32")


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    for bits, kind, scales, offsets, m in (
        (4, "bf16", True, False, 1), (4, "fp16", True, True, 1), (4, "bf16", False, False, 1),
        (8, "bf16", False, False, 1), (4, "fp32", True, False, 1), (4, "bf16", True, False, 2),
    ):  # fmt: skip
        packed = Packed(bits, 14336, 4096, 14336 * bits // 32, 112 if scales else 1, scales)
        share = configure(packed, m, target)
        constants: dict[str, object] = {
            "BITS": bits, "GROUP_LINES": packed.group_lines, "EVEN": True, "WHOLE": True,
            "SHARES": 1, "BM": m, "BN": share.outputs, "BL": share.lines, "AHEAD": share.ahead,
            "PAIRS": {"bf16": tl.bfloat16, "fp16": tl.float16}.get(kind),
        }  # fmt: skip
        constants |= {} if scales else {"group_scales": None}
        constants |= {} if offsets else {"group_offsets": None}
        signature = {
            "x": "*fp32" if kind == "fp32" else "*i32", "words": "*i32", "row_scales": "*fp32",
            "group_scales": "*fp16", "group_offsets": "*fp16",
            "bias": f"*{kind}", "out": f"*{kind}",
            "n": "i32", "lines": "i32", "groups": "i32", "width": "i32", "stride": "i32",
        }  # fmt: skip
        grouped = packed.n * packed.groups * 2 * (scales + offsets)
        moved = packed.n * packed.k * bits / 8 + grouped + 6 * packed.n + 4 * m * packed.k
        builds.append(
            Build(
                label=f"{bits} bit {kind} m {m}{' scales' * scales}{' offsets' * offsets}",
                function=linear_real_vector,
                signature={k: v for k, v in signature.items() if k not in constants},
                constants=constants,
                warps=share.warps * 32 // target.warp,
                stages=1,
                divisible=frozenset(("n", "lines", "groups", "width", "stride")),
                cost=Cost(moved, 2.0 * m * packed.n * packed.k, "fp32"),
                programs=packed.n // share.outputs,
            )
        )
    return builds


KERNELS.add(
    Kernel(
        name="linear_real_vector",
        operator="linear.real",
        accepts=_accepts,
        launch=launch("linear_real_vector", TUNING),
        cost=_cost,
        builds=_builds,
        preference=20,
        tuning=TUNING,
    )
)
