"""`linear.points` in float32: codes that name numbers in a table, looked up as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.weights import FLOATS, flat, rows_of
from qpass._kernels.gpu.words import tile_ids
from qpass.runtime.gpu import KERNELS, Build, Call, Cost, Kernel
from qpass.runtime.target import Target

HELD = ("weight", "points", "row_scales", "group_scales", "group_offsets", "bias")
TABLE = 256


@triton.jit
def linear_points(
    x, weight, points, row_scales, group_scales, group_offsets, bias, out,
    m, n, k, groups, width, stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of BM rows of x by BN outputs."""
    tile_m, tile_n = tile_ids(m, n, BM, BN)
    i = tile_m * BM + tl.arange(0, BM)
    j = tile_n * BN + tl.arange(0, BN)
    real_i = i < m
    real_j = j < n
    x += i.to(tl.int64) * stride
    weight += j.to(tl.int64) * k
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        c = start + tl.arange(0, BK)
        real_c = c < k
        there = real_j[None, :] & real_c[:, None]
        a = tl.load(x[:, None] + c[None, :], mask=real_i[:, None] & real_c[None, :], other=0.0)
        code = tl.load(weight[None, :] + c[:, None], mask=there, other=0)
        # bytes may be signed; the table is by their bits
        w = tl.load(points + (code.to(tl.int32) & 255))
        if group_scales is not None:
            at = j.to(tl.int64)[None, :] * groups + (c // width)[:, None]
            w *= tl.load(group_scales + at, mask=there, other=0.0)
            if group_offsets is not None:
                w += tl.load(group_offsets + at, mask=there, other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
    y = total * tl.load(row_scales + j, mask=real_j, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + j, mask=real_j, other=0.0).to(tl.float32)[None, :]
    place = i.to(tl.int64)[:, None] * n + j[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=real_i[:, None] & real_j[None, :])


def refuse_points(call: Call) -> str | None:
    """Why no kernel reads this weight, or None; what is wrong the definition will say."""
    x, weight = call["x"], call["weight"]
    if x.dtype not in FLOATS:
        return f"the input is {x.dtype}"
    if weight.dtype not in (torch.uint8, torch.int8):
        return f"the codes are {weight.dtype}"
    n, k = weight.shape
    scales = call["group_scales"]
    groups = 1 if scales is None else scales.shape[-1]
    shapes = {
        "points": (TABLE,), "row_scales": (n,), "group_scales": (n, groups),
        "group_offsets": (n, groups), "bias": (n,),
    }  # fmt: skip
    if x.shape[-1] != k or k == 0 or groups == 0 or k % groups:
        return f"{x.shape[-1]} features and {groups} groups do not fit {k} columns"
    for name in HELD:
        tensor = call[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes.get(name, (n, k)):
            return f"{name} has shape {tuple(tensor.shape)}"
        if tensor.device != x.device or not tensor.is_contiguous():
            return f"{name} is on {tensor.device} or not contiguous"
        if tensor.dtype is torch.float64:
            return f"{name} is float64"
    if call["group_offsets"] is not None and scales is None:
        return "there are group_offsets without group_scales"
    if x.numel() == 0 or n == 0:
        return "there is nothing to compute"
    return None


def sizes(call: Call) -> tuple[int, int, int, int]:
    """Rows of x, outputs, columns and groups."""
    (n, k), scales = call["weight"].shape, call["group_scales"]
    return rows_of(call["x"]), n, k, 1 if scales is None else scales.shape[1]


def _accepts(call: Call) -> str | None:
    if call["x"].dtype is not torch.float32:
        return f"the input is {call['x'].dtype}; others do 16-bit floats"
    return refuse_points(call)


def _tile(m: int) -> tuple[int, int, int, int]:
    """Rows of x, outputs, columns and warps."""
    return (16, 32, 16, 4) if m <= 32 else (32, 64, 16, 4)


def _launch(call: Call) -> Tensor:
    x, (m, n, k, groups) = flat(call["x"]), sizes(call)
    bm, bn, bk, warps = _tile(m)
    out = x.new_empty((*call["x"].shape[:-1], n))
    linear_points[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
        x, *(call[name] for name in HELD), out, m, n, k, groups, k // groups, x.stride(0),
        BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return out


def points_cost(call: Call) -> Cost:
    x = call["x"]
    m, n, k, _ = sizes(call)
    held = [call[name] for name in HELD if call[name] is not None]
    moved = sum(t.numel() * t.element_size() for t in (*held, x))
    kind = "fp32" if x.dtype is torch.float32 else "bf16"
    return Cost(moved + m * n * x.element_size(), 2.0 * m * n * k, kind)


def _builds(target: Target) -> Sequence[Build] | str:
    builds: list[Build] = []
    n = k = 4096
    for m in (16, 4096):
        bm, bn, bk, warps = _tile(m)
        moved = n * k + 4 * n * k / 32 + 4 * m * (n + k)
        builds.append(
            Build(
                label=f"fp32 m {m} scales",
                function=linear_points,
                signature={
                    "x": "*fp32",
                    "weight": "*u8",
                    "points": "*fp32",
                    "row_scales": "*fp32",
                    "group_scales": "*fp32",
                    "bias": "*fp32",
                    "out": "*fp32",
                    **dict.fromkeys(("m", "n", "k", "groups", "width", "stride"), "i32"),
                },
                constants={"BM": bm, "BN": bn, "BK": bk, "group_offsets": None},
                warps=warps,
                stages=2,
                divisible=frozenset(("n", "k", "groups", "width", "stride")),
                cost=Cost(moved, 2.0 * m * n * k, "fp32"),
                programs=-(-m // bm) * (n // bn),
            )
        )
    return builds


KERNELS.add(
    Kernel(
        name="linear_points",
        operator="linear.points",
        accepts=_accepts,
        launch=_launch,
        cost=points_cost,
        builds=_builds,
    )
)
