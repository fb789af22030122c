"""Which pieces do the blocks of random models share, and in how many ways is each written?"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 12
HEADS = 3
LENGTH = 5

BLOCKS: dict[str, Callable[[random.Random], nn.Module]] = {}


def block(kind: type[nn.Module]) -> type[nn.Module]:
    """Register a map of the residual stream to itself, or to what is added to it."""
    BLOCKS[kind.__name__] = lambda choice: kind(choice)
    return kind


class Rms(nn.Module):
    """A norm written out, as most models write it."""

    def __init__(self, width: int, *, shifted: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.shifted = shifted

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if x.dtype is torch.bfloat16 else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3)
        return y * (1 + self.weight if self.shifted else self.weight)


def norm(choice: random.Random, width: int = WIDTH) -> nn.Module:
    return choice.choice(
        (
            lambda: nn.RMSNorm(width),
            lambda: nn.RMSNorm(width, elementwise_affine=False, eps=1e-3),
            lambda: Rms(width),
            lambda: Rms(width, shifted=True),
            lambda: nn.LayerNorm(width),
            lambda: nn.LayerNorm(width, bias=False),
            lambda: nn.LayerNorm(width, elementwise_affine=False),
        )
    )()


class Transposed(nn.Module):
    """A linear layer that stores its weight [in, out]."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.matrix)
        return flat.reshape(*x.shape[:-1], -1)


class Functional(nn.Module):
    """A weight that is used transposed, without a module of its own."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(fan_in, fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.matrix.t())


def linear(choice: random.Random, fan_in: int, fan_out: int) -> nn.Module:
    return choice.choice(
        (
            lambda: nn.Linear(fan_in, fan_out),
            lambda: nn.Linear(fan_in, fan_out, bias=False),
            lambda: Transposed(fan_in, fan_out),
            lambda: Functional(fan_in, fan_out),
        )
    )()


ACTIVATIONS = (
    functional.relu,
    functional.gelu,
    functional.silu,
    torch.tanh,
    torch.sigmoid,
    functional.leaky_relu,
    lambda x: x,
    lambda x: functional.relu(x) ** 2,
    lambda x: functional.relu(x).square(),
    lambda x: functional.relu(x) * x,
    lambda x: x * x,
    lambda x: functional.relu(x) ** 1.5,
)
