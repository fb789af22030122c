"""What a number format is: a finite set of points, and codes that name them."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.registry import Registry


class Format(abc.ABC):
    """A finite codebook in R^dim; scales are not part of it, `QuantSpec` adds them.

    Codes are integers of `code_dtype`. For `dim == 1` points have the shape of the codes, otherwise
    one more axis of length `dim`.
    """

    name: str
    dim: int
    bits: int
    code_dtype: torch.dtype
    # the same points counted from zero, which is what asymmetric grids store; None: as they are
    unsigned: str | None

    @property
    @abc.abstractmethod
    def low(self) -> float:
        """The smallest coordinate of any point."""

    @property
    @abc.abstractmethod
    def high(self) -> float:
        """The largest coordinate of any point."""

    @abc.abstractmethod
    def codes(self) -> Tensor:
        """Every code, each once."""

    @abc.abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The float32 points that `codes` name."""

    @abc.abstractmethod
    def encode(self, points: Tensor) -> Tensor:
        """The code of the nearest point to each finite one; ties go to the even code."""


FORMATS: Registry[Format] = Registry("format", "qpass.formats")


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
