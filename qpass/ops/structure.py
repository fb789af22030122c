"""Operators that name a structure of attention; each is its definition and needs no kernel.

They are composite: every compiler that does not know them takes them apart by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

_LIBRARY = Library("qpass", "FRAGMENT")
_LIBRARY.define("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
_LIBRARY.define("repeat_heads(Tensor x, int n) -> Tensor")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the planes of the last axis: entries `2i, 2i+1` if interleaved, else `i, i + n/2`.

    `cos` and `sin` have an entry for each one of `x` and broadcast over its other axes (Su et al.,
    "Enhanced Transformer with Rotary Position Embedding", 2021).
    """
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def repeat_heads(x: Tensor, n: int) -> Tensor:
    """Repeat each entry of axis 1 of a `[b, h, t, d]` tensor `n` times in a row."""
    b, h, t, d = x.shape
    return x.unsqueeze(2).expand(b, h, n, t, d).reshape(b, h * n, t, d)


_LIBRARY.impl("rotary", rotary, "CompositeImplicitAutograd")
_LIBRARY.impl("repeat_heads", repeat_heads, "CompositeImplicitAutograd")

ROTARY = torch.ops.qpass.rotary.default
REPEAT_HEADS = torch.ops.qpass.repeat_heads.default
