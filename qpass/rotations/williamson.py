"""Which Hadamard matrices of order 4t come from four symmetric circulant matrices."""

from __future__ import annotations

import torch
from torch import Tensor

# four sequences for each t, found by search: bit i - 1 says that entries i and t - i are -1.
# Orders that Paley's constructions reach are left out.
_SEQUENCES = {
    23: (1329, 1875, 912, 1549),
    29: (1765, 9461, 459, 7204),
    43: (1462428, 1282805, 113298, 1804036),
}


def has_williamson(order: int) -> bool:
    """Whether `williamson(order)` exists."""
    return order % 4 == 0 and order // 4 in _SEQUENCES


def williamson(order: int) -> Tensor:
    """A Hadamard matrix in int8 (Williamson, Hadamard's determinant theorem, 1944)."""
    t = order // 4
    A, B, C, D = (_circulant(t, bits) for bits in _SEQUENCES[t])
    rows = ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))
    return torch.cat([torch.cat(row, 1) for row in rows])


def _circulant(t: int, bits: int) -> Tensor:
    half = [-1 if bits >> i & 1 else 1 for i in range((t - 1) // 2)]
    first = torch.tensor([1, *half, *reversed(half)], dtype=torch.int8)
    steps = torch.arange(t)
    return first[(steps[None, :] - steps[:, None]) % t]
