"""What a call is that GPU kernels are tried on, and random operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.runtime.gpu import Call
from qpass.runtime.target import Target

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """Arguments of an operator, and a name to run them by."""

    name: str
    operator: str
    arguments: tuple[Any, ...]

    def call(self, target: Target) -> Call:
        """The call on a target."""
        return Call.of(self.operator, self.arguments, target)


def random(seed: str) -> torch.Generator:
    """Numbers that depend on a name only."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(seed)) % 2**31)


def transform(n: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random signs and a random orthonormal factor, in float32."""
    signs = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
    square = torch.randn(m, m, generator=generator, dtype=torch.float64)
    return signs, torch.linalg.qr(square)[0].sign().float() if m == 1 else torch.linalg.qr(square)[
        0
    ].float().contiguous()


def rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of very different sizes, the second of zeros and the last with a hole."""
    x = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])
    flat = x.view(-1, shape[-1])
    if flat.shape[0] > 2:
        flat[1] = 0.0
        flat[-1, -1] = float("nan")
    return x.to(dtype)
