"""Models as users write them, without any library of models: what each is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 19
WIDTH = 24
HEADS = 3
LENGTH = 12  # the most positions that a model with tables of positions takes

Made = Callable[..., Any]


@dataclass(frozen=True)
class Custom:
    """How a model is made, and calls of it: the first is traced, the others have other sizes."""

    build: Callable[[], nn.Module]
    calls: tuple[Callable[[], Any], ...]
    dtype: torch.dtype = torch.float64

    def model(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, every parameter and statistic random."""
        torch.manual_seed(seed)
        made = self.build().to(self.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((0.3 * noise).to(parameter.dtype))
            for name, buffer in made.named_buffers():
                if "running" in name:
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        return made.eval()


CUSTOM: dict[str, Custom] = {}


def custom(
    *calls: Callable[[], Any], dtype: torch.dtype = torch.float64
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class of models, made without arguments."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        CUSTOM[kind.__name__] = Custom(kind, calls, dtype)
        return kind

    return register


def tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(VOCABULARY, shape, generator=_seeded(len(shape)))


def values(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=_seeded(1), dtype=torch.float64).to(dtype)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SENTENCES = (tokens(2, 7), tokens(3, 5))
FEATURES = (values(2, 7, WIDTH), values(3, 5, WIDTH))
IMAGES = (values(2, 3, 8, 8), values(3, 3, 8, 8))
