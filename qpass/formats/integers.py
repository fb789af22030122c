"""Formats whose points are the integers of a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats.base import Format


@final
@dataclass(frozen=True, slots=True)
class Integers(Format):
    """The integers from `first` to `last`; the code of an integer is the integer itself."""

    name: str
    bits: int
    first: int
    last: int
    unsigned: str | None = None
    dim: int = 1

    @property
    def code_dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.int8 if self.first < 0 else torch.uint8

    @property
    def low(self) -> float:
        return float(self.first)

    @property
    def high(self) -> float:
        return float(self.last)

    def codes(self) -> Tensor:
        return torch.arange(self.first, self.last + 1, dtype=self.code_dtype, device="cpu")

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def encode(self, points: Tensor) -> Tensor:
        return points.round().clamp(self.first, self.last).to(self.code_dtype)

    def round_(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(self.first, self.last)

    @property
    def gap(self) -> float:
        return 1.0

    @property
    def magnitudes(self) -> tuple[float, ...]:
        furthest = max(-self.first, self.last)
        return tuple(float(m) for m in range(furthest, 0, -1))
