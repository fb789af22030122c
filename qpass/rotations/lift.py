"""How an orthogonal matrix becomes one that fixes the all-ones vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# below this |v|^2 the reflection divides rounding errors by |v|; the plane rotation does not
_NEAR = 1 / 16


def lift(Q: Tensor) -> Tensor:
    """`R = Q M` with M orthogonal and `1 @ R == 1`, for an orthogonal float64 `Q` `[n, n]`.

    M reflects `u Q` onto the unit vector u along the all-ones vector; where the two almost agree
    it rotates in their plane instead, so that `R == Q` where Q fixes u already.
    """
    n = Q.shape[-1]
    u = torch.full((n,), 1 / math.sqrt(n), dtype=Q.dtype, device=Q.device)
    image = u @ Q
    v = image - u
    if v @ v >= _NEAR:
        return Q - torch.outer(Q @ v, v) * (2 / (v @ v))
    w = image + u
    return Q - torch.outer(Q @ w, w) / (1 + image @ u) + 2 * torch.outer(Q @ image, u)
