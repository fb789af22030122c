"""What the linear kernels share on the host: sizes of a packed weight, refusals, costs, builds."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qpass._kernels.gpu.packed import Packed
from qpass._kernels.gpu.tiles import Tile
from qpass.errors import BadInput
from qpass.ops.linear import check_linear
from qpass.runtime.gpu import Build, Call, Cost
from qpass.runtime.target import Target
from qpass.runtime.tuned import bucket

HELD = ("weight", "row_scales", "group_scales", "group_offsets", "bias")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
}


def rows_of(x: Tensor) -> int:
    """How many rows the last axis of x has."""
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def flat(x: Tensor) -> Tensor:
    """All rows of x as a matrix whose last axis is dense."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def has_ptx(target: Target, dtype: torch.dtype) -> bool:
    """Whether weights become floats of this type through PTX; the interpreter knows none."""
    return (
        target.backend == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and not triton.knobs.runtime.interpret
    )


def has_tf32(target: Target) -> bool:
    """Whether float32 products may be made of TF32 ones."""
    return target.backend == "cuda" and not triton.knobs.runtime.interpret


def refuse_weight(call: Call, x: Tensor) -> str | None:
    """Why no kernel reads this weight, or None; what is wrong the definition will say."""
    held = {name: call[name] for name in HELD if call[name] is not None}
    try:
        check_linear(
            x.shape[-1], *(call[name] for name in HELD),
            call["bits"], call["in_features"], call["out_features"],
        )  # fmt: skip
    except BadInput as error:
        return str(error)
    for name, tensor in held.items():
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, the input on {x.device}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.dtype is torch.float64:
            return f"{name} is float64"
    if call["weight"].dtype is not torch.uint8:
        return f"the weight is {call['weight'].dtype}, not packed codes"
    if x.numel() == 0 or call["out_features"] == 0:
        return "there is nothing to compute"
    return None


def linear_key(call: Call, x: Tensor) -> str:
    """What a configuration of a linear kernel may depend on; `bucket` stands for the rows."""
    sizes = f"{bucket(rows_of(x))} x {call['in_features']} x {call['out_features']}"
    groups = 0 if call["group_scales"] is None else call["group_scales"].shape[1]
    offsets = " with offsets" if call["group_offsets"] is not None else ""
    return f"{sizes}, {call['bits']} bit, {groups} groups{offsets}, {TYPES[x.dtype]}"


def cost(call: Call, x: Tensor, out: torch.dtype, kind: str) -> Cost:
    """Each tensor read or written once, and a multiply-add for each weight and row."""
    held = [
        call[name] for name in ("weight", "row_scales", "group_scales", "group_offsets", "bias")
    ]
    moved = sum(t.numel() * t.element_size() for t in (*held, x) if t is not None)
    m, n = rows_of(x), call["out_features"]
    return Cost(moved + m * n * out.itemsize, 2.0 * m * n * call["in_features"], kind)


def matrix_build(
    function: Any,
    packed: Packed,
    m: int,
    tile: Tile,
    target: Target,
    dtype: torch.dtype,
    *,
    offsets: bool,
) -> Build:
    """One compilation of a matrix kernel for even sizes; the result is bfloat16 or `dtype`."""
    scaled = packed.scaled
    out = "bf16" if dtype is torch.int8 else TYPES[dtype]
    signature = {
        "x": f"*{TYPES[dtype]}", "words": "*i32", "row_scales": "*fp32", "group_scales": "*fp16",
        "group_offsets": "*fp16", "sums": "*fp32", "bias": f"*{out}", "out": f"*{out}",
        **dict.fromkeys(
            ("m", "n", "lines", "groups", "group_lines", "width", "chunks", "stride"), "i32"
        ),
    }  # fmt: skip
    if dtype is torch.int8:
        signature["scales"] = "*fp32"
    constants: dict[str, object] = {
        "BITS": packed.bits, "EVEN": True, "SHARES": 1, "SPREAD": tile.spread,
        "TF32": has_tf32(target), "BM": tile.rows, "BN": tile.outputs, "BL": tile.lines,
    }  # fmt: skip
    if dtype is not torch.int8:
        constants["PTX"] = has_ptx(target, dtype)
        constants |= {"SORT": tile.sort, "scales": None}
    constants |= {} if scaled else {"group_scales": None, "groups": 1}
    constants |= {} if offsets else {"group_offsets": None, "sums": None}
    constants |= {"low": None, "up": None, "rank": 0}
    kind = {torch.int8: "int8", torch.float32: "fp32"}.get(dtype, "bf16")
    grouped = packed.n * packed.groups * 2 * (scaled + offsets)
    moved = packed.n * packed.k * packed.bits / 8 + grouped + m * packed.k * dtype.itemsize
    return Build(
        label=f"{packed.bits} bit {TYPES[dtype]} m {m}{' scales' * scaled}{' offsets' * offsets}",
        function=function,
        signature={name: kind for name, kind in signature.items() if name not in constants},
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        mma=None if kind == "fp32" else kind,
        divisible=frozenset(("n", "lines", "groups", "group_lines", "width", "stride")),
        cost=Cost(moved + 2 * m * packed.n, 2.0 * m * packed.n * packed.k, kind),
        programs=-(-m // tile.rows) * -(-packed.n // tile.outputs),
    )
