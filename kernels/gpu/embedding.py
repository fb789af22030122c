"""`embedding`: rows of a table of bytes, scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.weights import FLOATS, TYPES
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target


@triton.jit
def embedding_rows(indices, codes, scales, out, rows, width, stride, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row. An index outside the table stops the GPU."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + i).to(tl.int64)
    inside = (row >= 0) & (row < rows)
    tl.device_assert(inside, "an index lies outside the embedding table")
    # where assertions are compiled out, such a row is NaN
    row = tl.where(inside, row, 0)
    scale = tl.where(inside, tl.load(scales + row), float("nan"))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < width
    code = tl.load(codes + row * stride + column, mask=real, other=0)
    tl.store(out + i * width + column, (code * scale).to(out.dtype.element_ty), mask=real)


def _accepts(call: Call) -> str | None:
    indices, codes, scales = call["indices"], call["codes"], call["scales"]
    if indices.dtype not in (torch.int32, torch.int64):
        return f"the indices are {indices.dtype}"
    if codes.dtype is not torch.int8 or scales.dtype is not torch.float32:
        return f"the table is {codes.dtype} with {scales.dtype} scales"
    if call["dtype"] not in FLOATS:
        return f"the result is {call['dtype']}"
    if tuple(scales.shape) != codes.shape[:1]:
        return f"{codes.shape[0]} rows do not fit scales {tuple(scales.shape)}"
    if not indices.device == codes.device == scales.device:
        return f"the indices are on {indices.device}, the table on {codes.device}"
    if codes.stride(-1) != 1 or not scales.is_contiguous():
        return "the table is not contiguous along its rows"
    if indices.numel() == 0 or codes.numel() == 0:
        return "there is nothing to look up"
    return None


def _block(width: int) -> int:
    return min(2048, triton.next_power_of_2(width))


def _launch(call: Call) -> Tensor:
    indices, codes = call["indices"], call["codes"]
    width = codes.shape[1]
    out = codes.new_empty((*indices.shape, width), dtype=call["dtype"])
    block = _block(width)
    embedding_rows[(indices.numel(), triton.cdiv(width, block))](
        indices.contiguous(), codes, call["scales"], out, codes.shape[0], width, codes.stride(0),
        BLOCK=block, num_warps=max(1, block // 16 // call.target.warp),
        debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return out


def _cost(call: Call) -> Cost:
    indices, width = call["indices"], call["codes"].shape[1]
    each = width * (1 + call["dtype"].itemsize) + 4 + indices.element_size()
    return Cost(indices.numel() * each, indices.numel() * width, "fp32")


def _builds(target: Target) -> Sequence[Build] | str:
    sizes = dict.fromkeys(("rows", "width", "stride"), "i32")
    return [
        Build(
            label=f"4096 {TYPES[dtype]}",
            function=embedding_rows,
            signature={
                "indices": "*i64",
                "codes": "*i8",
                "scales": "*fp32",
                "out": f"*{TYPES[dtype]}",
                **sizes,
            },
            constants={"BLOCK": _block(4096)},
            warps=_block(4096) // 16 // target.warp,
            stages=1,
            divisible=frozenset(("width", "stride")),
            cost=Cost(4096 * (4096 * (1 + dtype.itemsize) + 12), 4096 * 4096, "fp32"),
            programs=4096 * 2,
        )
        for dtype in FLOATS
    ]


KERNELS.add(
    Kernel(
        name="embedding_rows",
        operator="embedding",
        accepts=_accepts,
        launch=_launch,
        cost=_cost,
        builds=_builds,
    )
)
