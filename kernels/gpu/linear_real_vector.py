"""`linear.real` of one row: a matrix of integers times a vector, as fast as the weights arrive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.finish import finish
from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.weights import FLOATS, cost, refuse_weight, rows_of
from qpass._kernels.gpu.words import column
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target

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
def linear_real_vector(
    x, words, row_scales, group_scales, group_offsets, bias, out,
    n, lines, groups, width,
    BITS: tl.constexpr, GROUP_LINES: tl.constexpr, EVEN: tl.constexpr, PAIRS: tl.constexpr,
    WHOLE: tl.constexpr, SHARES: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """One program: one block of 16 rows and a share of its lines, BL lines at a time.

    EVEN: groups end where lines end. WHOLE: so do shares. PAIRS is the type of x where it comes as
    int32, two values each, and None where it comes as it is.
    """
    STEP: tl.constexpr = 32 // BITS
    ZERO: tl.constexpr = 2 ** (BITS - 1) if BITS == 8 or group_offsets is None else 0
    block = tl.program_id(0)
    rows = tl.arange(0, 16)
    nought = n >> 31
    share = tl.cdiv(tl.cdiv(lines, BL), SHARES) * BL
    first = tl.program_id(1) * share
    last = first + share if WHOLE else tl.minimum(first + share, lines)
    words += block.to(tl.int64) * lines * 16
    total = tl.zeros((BL, 16), tl.float32)
    for start in range(first, last, BL):
        line = start + tl.arange(0, BL)
        real = None if WHOLE else line < last
        reals = None if WHOLE else real[:, None]
        w = tl.load(words + line[:, None] * 16 + rows[None, :], mask=reals)
        group = line // GROUP_LINES
        if group_scales is not None:
            at = (block * groups + group)[:, None] * 16 + rows[None, :]
            scale = tl.load(group_scales + at, mask=reals)
            if group_offsets is not None:
                offset = tl.load(group_offsets + at, mask=reals)
        products = tl.zeros((BL, 16), tl.float32)
        sums = tl.zeros((BL,), tl.float32)
        if PAIRS is not None:
            for h in tl.static_range(STEP // 2):
                low, high = two(tl.load(x + line * (STEP // 2) + h, mask=real), PAIRS)
                products += column(w, BITS, 2 * h, ZERO, nought) * low[:, None]
                products += column(w, BITS, 2 * h + 1, ZERO, nought) * high[:, None]
                sums += low + high
        else:
            inside = (line - group * GROUP_LINES) * STEP
            source = x + line * STEP if EVEN else x + group * width + inside
            for j in tl.static_range(STEP):
                there = real
                if not EVEN:
                    there = (line < last) & (inside + j < width)
                v = tl.load(source + j, mask=there, other=None if there is None else 0.0)
                v = v.to(tl.float32)
                products += column(w, BITS, j, ZERO, nought) * v[:, None]
                sums += v
        if group_scales is not None:
            products *= scale.to(tl.float32)
            if group_offsets is not None:
                products += offset.to(tl.float32) * sums[:, None]
        total += products if WHOLE else tl.where(reals, products, 0.0)
    y = tl.sum(total, 0)
    row = block * 16 + rows
    if SHARES > 1:
        tl.store(out + tl.program_id(1) * n + row, y, mask=row < n)
    else:
        y *= tl.load(row_scales + row, mask=row < n, other=0.0)
        if bias is not None:
            y += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
        tl.store(out + row, y.to(out.dtype.element_ty), mask=row < n)


def _accepts(call: Call) -> str | None:
    x = call["x"]
    if x.dtype not in FLOATS:
        return f"the input is {x.dtype}"
    if (why := refuse_weight(call, x)) is not None:
        return why
    if rows_of(x) != 1:
        return f"{rows_of(x)} rows, and this one is for one"
    return None


def configure(packed: Packed, target: Target) -> tuple[int, int, int]:
    """Lines at a time, warps, and shares of the lines."""
    blocks = -(-packed.n // 16)
    if blocks >= 3 * target.multiprocessors:
        return (64, 4, 1) if packed.bits == 4 else (256, 16, 1)
    # 16 warps on each multiprocessor keep enough loads in the air
    lines = 256 if packed.lines >= 1024 else 128
    if blocks >= 3 * target.multiprocessors // 2 or packed.lines < 512:
        return lines, 16, 1
    shares = 2 if blocks >= target.multiprocessors // 2 else 4
    return lines, 16, shares if packed.lines >= lines * shares else 1


def run(call: Call, lines: int, warps: int, shares: int) -> Tensor:
    """Serve a call with a given configuration."""
    x, weight = call["x"], call["weight"]
    packed = Packed.of(call)
    out = x.new_empty((*x.shape[:-1], packed.n))
    target = out if shares == 1 else x.new_empty((shares, 1, packed.n), dtype=torch.float32)
    even = packed.width % packed.step == 0
    x = x.reshape(-1).contiguous()
    pairs = PAIRS.get(x.dtype) if even and x.storage_offset() % 2 == 0 else None
    linear_real_vector[(weight.shape[0], shares)](
        x if pairs is None else x.view(torch.int32), weight.view(torch.int32), call["row_scales"],
        call["group_scales"], call["group_offsets"], call["bias"], target,
        packed.n, packed.lines, packed.groups, packed.width,
        BITS=packed.bits, GROUP_LINES=packed.group_lines, EVEN=even, PAIRS=pairs,
        WHOLE=packed.lines % (lines * shares) == 0, SHARES=shares, BL=lines,
        num_warps=warps * 32 // call.target.warp,
    )  # fmt: skip
    if shares > 1:
        finish(target, call["row_scales"], None, call["bias"], out)
    return out


def _launch(call: Call) -> Tensor:
    return run(call, *configure(Packed.of(call), call.target))


def _cost(call: Call) -> Cost:
    return cost(call, call["x"], call["x"].dtype, "fp32")


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    for bits, kind, scales, offsets in (
        (4, "bf16", True, False), (4, "fp16", True, True), (4, "bf16", False, False),
        (8, "bf16", False, False), (4, "fp32", True, False),
    ):  # fmt: skip
        packed = Packed(bits, 14336, 4096, 14336 * bits // 32, 112 if scales else 1, scales)
        lines, warps, _ = configure(packed, target)
        constants: dict[str, object] = {
            "BITS": bits, "GROUP_LINES": packed.group_lines, "EVEN": True, "WHOLE": True,
            "SHARES": 1, "BL": lines, "PAIRS": {"bf16": tl.bfloat16, "fp16": tl.float16}.get(kind),
        }  # fmt: skip
        constants |= {} if scales else {"group_scales": None}
        constants |= {} if offsets else {"group_offsets": None}
        signature = {
            "x": "*fp32" if kind == "fp32" else "*i32", "words": "*i32", "row_scales": "*fp32",
            "group_scales": "*fp16", "group_offsets": "*fp16",
            "bias": f"*{kind}", "out": f"*{kind}",
            "n": "i32", "lines": "i32", "groups": "i32", "width": "i32",
        }  # fmt: skip
        grouped = packed.n * packed.groups * 2 * (scales + offsets)
        moved = packed.n * packed.k * bits / 8 + grouped + 6 * packed.n + 4 * packed.k
        builds.append(
            Build(
                label=f"{bits} bit {kind}{' scales' * scales}{' offsets' * offsets}",
                function=linear_real_vector,
                signature={k: v for k, v in signature.items() if k not in constants},
                constants=constants,
                warps=warps * 32 // target.warp,
                stages=1,
                divisible=frozenset(("n", "lines", "groups", "width")),
                cost=Cost(moved, 2.0 * packed.n * packed.k, "fp32"),
                programs=packed.n // 16,
            )
        )
    return builds


KERNELS.add(
    Kernel(
        name="linear_real_vector",
        operator="linear.real",
        accepts=_accepts,
        launch=_launch,
        cost=_cost,
        builds=_builds,
        preference=20,
    )
)
