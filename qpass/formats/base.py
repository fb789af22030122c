"""What a number format is: a finite set of points, and codes that name them."""

from __future__ import annotations

import abc

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

    @abc.abstractmethod
    def round_(self, values: Tensor) -> Tensor:
        """Overwrite finite float32 or float64 `values` by the points that `encode` would choose."""

    @property
    @abc.abstractmethod
    def gap(self) -> float:
        """The largest distance between neighbouring points."""

    @property
    @abc.abstractmethod
    def magnitudes(self) -> tuple[float, ...]:
        """Every distance of a point from zero but 0, the largest first."""


FORMATS: Registry[Format] = Registry("format", "qpass.formats")
