"""What is done to activations before a product: columns put in another order, groups added up."""

# r rows, K columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def spread_columns(
    x, out, stride, width, chunks, total,
    RUN: tl.constexpr, PARTS: tl.constexpr, BL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill a row: for each chunk of BL words, for each of PARTS, RUN columns of each word.

    A group is `width` columns in `chunks` chunks; what a chunk has beyond its group is 0.
    """
    COLUMNS: tl.constexpr = BL * RUN * PARTS
    i = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chunk = place // COLUMNS
    group = chunk // chunks
    rest = place % COLUMNS
    part = rest // (BL * RUN)
    word = rest % (BL * RUN) // RUN
    column = (chunk - group * chunks) * COLUMNS + word * (RUN * PARTS) + part * RUN + place % RUN
    real = (place < total) & (column < width)
    values = tl.load(x + i * stride + group * width + column, mask=real, other=0)
    tl.store(out + i * total + place, values, mask=place < total)


def spread(
    x: Tensor, groups: int, width: int, chunks: int, run: int, parts: int, bl: int
) -> Tensor:
    """X `[r, K]` as `[r, groups * chunks * bl * run * parts]`."""
    total = groups * chunks * bl * run * parts
    out = torch.empty((x.shape[0], total), dtype=x.dtype, device=x.device)
    spread_columns[(x.shape[0], triton.cdiv(total, 1024))](
        x, out, x.stride(0), width, chunks, total, RUN=run, PARTS=parts, BL=bl, BLOCK=1024
    )
    return out


@triton.jit
def group_sums(
    x, out, stride, groups, width, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Add up GROUPS groups of a row, COLUMNS columns at a time; sums of integers are exact."""
    i = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((GROUPS,), kind)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = (group < groups)[:, None] & (column < width)[None, :]
        at = i * stride + group[:, None] * width + column[None, :]
        total += tl.sum(tl.load(x + at, mask=real, other=0).to(kind), 1)
    tl.store(out + i * groups + group, total.to(tl.float32), mask=group < groups)


def sums(x: Tensor, groups: int, width: int) -> Tensor:
    """The sum of each group of each row of x, float32 `[r, groups]`."""
    out = torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device)
    columns = min(2048, triton.next_power_of_2(width))
    at_once = min(2048 // columns, triton.next_power_of_2(groups))
    group_sums[(x.shape[0], triton.cdiv(groups, at_once))](
        x, out, x.stride(0), groups, width, GROUPS=at_once, COLUMNS=columns
    )
    return out
