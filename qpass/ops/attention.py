"""What attention computes: every query head reads the key and value head it belongs to."""

# b batch, h query heads, g key and value heads, n = h / g, t queries, s keys, d and e head widths

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import wide
from qpass.ops.library import define


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """`softmax(query @ key.mT * scale + mask) @ value`, query head i reading head `i // n`.

    query `[b, h, t, d]`, key `[b, g, s, d]`, value `[b, g, s, e]`, one floating dtype, and
    `h = g * n`. The result is `[b, h, t, e]` in that dtype, in the memory order of `[b, t, h, e]`;
    it is computed in float32 (float64 for float64).
    mask is True where a query may see a key, or a floating tensor that is added; it broadcasts to
    `[b, h, t, s]`. With `is_causal` query i sees keys 0 .. i, besides what the mask says.
    A query that sees no key (or none whose score is above -inf) gets 0. A NaN or an infinity at a
    key that a query does not see may or may not reach its result.
    """
    return torch.ops.qpass.attention.default(query, key, value, mask, is_causal, scale)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise BadInput(f"attention takes [batch, heads, length, width] tensors, got {shapes}")
    if not (
        query.shape[0] == key.shape[0] == value.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[1:3] == value.shape[1:3]
    ):
        raise BadInput(f"query, key and value of attention do not fit together: {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise BadInput(f"the query heads are no multiple of the key heads: {shapes}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        kinds = f"{query.dtype}, {key.dtype}, {value.dtype}"
        raise BadInput(f"query, key and value share one floating dtype, got {kinds}")
    if mask is None:
        return
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise BadInput(f"a mask is boolean or floating, got {mask.dtype}")
    full = (*query.shape[:3], key.shape[2])
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) > 4 or any(m not in (1, size) for m, size in zip(sizes, full, strict=True)):
        raise BadInput(f"a mask of shape {list(mask.shape)} does not broadcast to {list(full)}")


def _specification(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    _check(query, key, value, mask)
    dtype = wide(query.dtype)
    n = query.shape[1] // key.shape[1]
    k = key.to(dtype).repeat_interleave(n, 1)
    v = value.to(dtype).repeat_interleave(n, 1)
    scores = query.to(dtype) @ k.mT * scale
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    if is_causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    blind = scores.isneginf().all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    return _shapes(query, key, value, mask, is_causal, scale).copy_(weights @ v)


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    b, h, t, _ = query.shape
    return query.new_empty((b, t, h, value.shape[3])).transpose(1, 2)


define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale)"
    " -> Tensor",
    _specification,
    _shapes,
)

# what a graph calls
ATTENTION = torch.ops.qpass.attention.default
