"""Rotations drawn uniformly from all orthogonal matrices: the baseline without structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation, no_such_width
from qpass.rotations.counter import normals
from qpass.rotations.group import Group


@final
@dataclass(frozen=True, slots=True)
class Haar(Rotation):
    """Equal keys give matrices equal to rounding: the factorization is the platform's own."""

    name: str = "haar"
    group: Group = Group.ORTHOGONAL

    def supports(self, n: int) -> str | None:
        return no_such_width(n)

    def matrix(self, n: int, key: Key) -> Tensor:
        Q, R = torch.linalg.qr(normals(key, n * n).reshape(n, n))
        # QR alone is not uniform; a positive diagonal of R makes it unique and Q uniform
        # (Mezzadri, How to generate random matrices from the classical compact groups, 2007)
        return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)

    def fast(self, n: int, key: Key) -> Fast | None:
        return None


ROTATIONS.add(Haar())
