"""The rotation that does nothing: always a candidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation, no_such_width
from qpass.rotations.group import Group


@final
@dataclass(frozen=True, slots=True)
class Identity(Rotation):
    name: str = "identity"
    group: Group = Group.IDENTITY

    def supports(self, n: int) -> str | None:
        return no_such_width(n)

    def matrix(self, n: int, key: Key) -> Tensor:
        return torch.eye(n, dtype=torch.float64)

    def fast(self, n: int, key: Key) -> Fast | None:
        one = torch.ones(1, 1, dtype=torch.float64)
        return Fast(torch.ones(n, dtype=torch.float64), one, 1)


ROTATIONS.add(Identity())
