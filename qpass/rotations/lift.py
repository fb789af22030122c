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
    a_kn, b_kn = lift_terms(_ones(Q.shape[-1], Q) @ Q)
    return Q + (Q @ a_kn.mT) @ b_kn


def lift_terms(image: Tensor) -> tuple[Tensor, Tensor]:
    """A and B `[k, n]` with `R = Q (I + A.T B)`, where `image` is `u Q`; k is 1 or 2."""
    u = _ones(image.shape[-1], image)
    v = image - u
    if v @ v >= _NEAR:
        return v.unsqueeze(0), v.unsqueeze(0) * (-2 / (v @ v))
    w = image + u
    return torch.stack((w, image)), torch.stack((w / -(1 + image @ u), 2 * u))


def _ones(n: int, like: Tensor) -> Tensor:
    return torch.full((n,), 1 / math.sqrt(n), dtype=like.dtype, device=like.device)
