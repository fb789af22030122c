"""Products to round the weights of: a weight, and what calibration measures of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.rounding import Statistic, Stats


@dataclass(frozen=True, slots=True)
class Layer:
    """A weight `[n, k]` and rows of inputs `[tokens, k]`, float64."""

    weight: Tensor
    x: Tensor

    @property
    def stats(self) -> Stats:
        return statistics(self.x, len(self.weight))

    def error(self, quantized: Tensor, x: Tensor | None = None) -> float:
        """The relative squared error of the outputs on these or on other inputs."""
        x = self.x if x is None else x
        lost = (quantized.double() - self.weight) @ x.T
        return float(lost.square().sum() / (self.weight @ x.T).square().sum())


def statistics(x: Tensor, n: int, x_float: Tensor | None = None) -> Stats:
    """Every statistic that a rounding may ask for; gradients are random."""
    g = torch.randn(3 * n, n, dtype=torch.float64, generator=seeded(n))
    g = g * torch.linspace(0.5, 3, n, dtype=torch.float64)
    x_float = x if x_float is None else x_float
    return {
        Statistic.HESSIAN: x.T @ x,
        Statistic.HELD_HESSIAN: x[::2].T @ x[::2],
        Statistic.CROSS: x_float.T @ x,
        Statistic.HELD_CROSS: x_float[::2].T @ x[::2],
        Statistic.OUTPUT_HESSIAN: g.T @ g,
        Statistic.SAMPLES: x[:64].float(),
    }


def layer(n: int, k: int, tokens: int, seed: int, *, correlated: bool = True) -> Layer:
    """A random layer; its inputs have a mean, loud and quiet columns, and depend on each other."""
    generator = seeded(seed)
    w = torch.randn(n, k, dtype=torch.float64, generator=generator)
    return Layer(
        w * torch.rand(n, 1, dtype=torch.float64, generator=generator),
        inputs(k, tokens, seed, correlated=correlated),
    )


def inputs(k: int, tokens: int, seed: int, *, correlated: bool = True, draw: int = 0) -> Tensor:
    """Rows of the distribution that `seed` names; other draws are other rows of it."""
    generator = seeded(seed)
    x = torch.randn(tokens, k, dtype=torch.float64, generator=seeded(1000 + 77 * seed + draw))
    if not correlated:
        return x
    mix = torch.randn(k, k, dtype=torch.float64, generator=generator) / k**0.5
    mix = mix * torch.linspace(1, 0.05, k, dtype=torch.float64).unsqueeze(1)
    loud = torch.randn(k, dtype=torch.float64, generator=generator).exp()
    return (x @ mix + 0.1) * loud


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
