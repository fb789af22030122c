"""What linear layers of experts compute whose weights are packed and stacked.

Tokens come sorted by expert, as a router leaves them: each expert multiplies a run of rows.
"""

# T rows of x, E experts, K in_features, N out_features; the rest as in `packing`

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.ops.library import define, specification
from qpass.ops.linear import check_linear
from qpass.ops.packing import PackedLinear


@final
@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The tensors of a `PackedLinear`, those of each expert behind one another on a first axis."""

    weight: Tensor
    row_scales: Tensor
    group_scales: Tensor | None
    group_offsets: Tensor | None
    bits: int
    in_features: int
    out_features: int


def pack_experts(experts: Sequence[PackedLinear]) -> PackedExperts:
    """Stack weights of one shape, packed alike."""
    kinds = {
        (e.bits, e.in_features, e.out_features, e.group_scales is None, e.group_offsets is None)
        for e in experts
    }
    if len(kinds) != 1 or len({e.weight.shape for e in experts}) != 1:
        raise BadInput(f"experts are packed alike; these are of {len(kinds)} kinds")
    first = experts[0]

    def stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.stack(there) if there else None

    return PackedExperts(
        torch.stack([e.weight for e in experts]),
        torch.stack([e.row_scales for e in experts]),
        stacked([e.group_scales for e in experts]),
        stacked([e.group_offsets for e in experts]),
        first.bits,
        first.in_features,
        first.out_features,
    )


def linear_experts(
    x: Tensor, ends: Tensor, packed: PackedExperts, bias: Tensor | None = None
) -> Tensor:
    """`x[i] @ W[e].T + bias[e]` in the dtype of `x [T, K]`, computed in float32.

    Expert e has the rows from `ends[e - 1]` (0 for the first) up to `ends[e]`: `ends` int32 or
    int64 `[E]` does not decrease. Rows from the last end on are of no expert, and become 0. bias is
    `[E, N]`.
    """
    return torch.ops.qpass.linear.experts(
        x, ends, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
        bias, packed.bits, packed.in_features, packed.out_features,
    )  # fmt: skip


def check_experts(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    k: int,
    n: int,
) -> None:
    """Raise `BadInput` unless rows and the tensors of all experts fit together, but for values."""
    if x.dim() != 2:
        raise BadInput(f"tokens sorted by expert are rows, got shape {tuple(x.shape)}")
    if ends.dim() != 1 or ends.dtype not in (torch.int32, torch.int64):
        raise BadInput(f"ends is {ends.dtype} {tuple(ends.shape)}, expected one integer an expert")
    held = (weight, row_scales, group_scales, group_offsets, bias)
    counts = [0 if t.dim() == 0 else t.shape[0] for t in held if t is not None]
    if set(counts) != {ends.shape[0]} or ends.shape[0] == 0:
        raise BadInput(f"{ends.shape[0]} ends do not fit tensors of {counts} experts")
    scales, offsets, added = (None if t is None else t[0] for t in held[2:])
    check_linear(x.shape[1], weight[0], row_scales[0], scales, offsets, added, bits, k, n)


def _specification(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    held = (weight, row_scales, group_scales, group_offsets, bias)
    check_experts(x, ends, *held, bits, in_features, out_features)
    product = specification("linear.real")
    y = x.new_zeros((x.shape[0], out_features))
    start = 0
    for e, end in enumerate(ends.tolist()):
        if not start <= end <= x.shape[0]:
            raise BadInput(f"ends[{e}] is {end}, after {start} and with {x.shape[0]} rows")
        parts = [None if t is None else t[e] for t in held]
        if end > start:
            y[start:end] = product(x[start:end], *parts, bits, in_features, out_features)
        start = end
    return y


def _shapes(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    row_scales: Tensor,
    group_scales: Tensor | None,
    group_offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


define(
    "linear.experts(Tensor x, Tensor ends, Tensor weight, Tensor row_scales, Tensor? group_scales,"
    " Tensor? group_offsets, Tensor? bias, int bits, int in_features, int out_features) -> Tensor",
    _specification,
    _shapes,
)
