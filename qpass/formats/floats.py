"""Formats whose points are floating-point numbers of few bits, with both signs of each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats.base import Format
from qpass.formats.wide import wide


@final
@dataclass(frozen=True, slots=True)
class Floats(Format):
    """A sign, an exponent and a mantissa; the code of a number is its bit pattern.

    The largest number has the pattern `last`; what lies above it, without the sign, is no number.
    Subnormal numbers are points like any other. Zero has the code 0: that of -0 is decoded, but
    never written.
    """

    name: str
    bits: int
    mantissa: int
    bias: int
    last: int
    unsigned: str | None = None
    dim: int = 1

    @property
    def code_dtype(self) -> torch.dtype:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.uint8

    @property
    def low(self) -> float:
        return -self.high

    @property
    def high(self) -> float:
        return self._number(self.last)

    def codes(self) -> Tensor:
        positive = torch.arange(self.last + 1, dtype=torch.uint8, device="cpu")
        return torch.cat((positive, positive[1:] | self._sign))

    def decode(self, codes: Tensor) -> Tensor:
        return _points(self).to(codes.device)[codes.long()]

    def encode(self, points: Tensor) -> Tensor:
        nearest = self.round_(points.to(wide(points.dtype), copy=True))
        # patterns are in the order of the numbers
        numbers = _points(self)[: self.last + 1].to(nearest)
        codes = torch.searchsorted(numbers, nearest.abs().contiguous()).to(torch.uint8)
        return torch.where(nearest < 0, codes | self._sign, codes)

    def round_(self, values: Tensor) -> Tensor:
        # numbers of one exponent are evenly spaced, and an even multiple has an even pattern
        steps = power_below(values.clamp_(self.low, self.high))
        steps.clamp_(min=2.0 ** (1 - self.bias)).mul_(2.0**-self.mantissa)
        return values.div_(steps).round_().mul_(steps)

    @property
    def gap(self) -> float:
        return self.high - self._number(self.last - 1)

    @property
    def magnitudes(self) -> tuple[float, ...]:
        return tuple(self._number(code) for code in range(self.last, 0, -1))

    @property
    def _sign(self) -> int:
        return 2 ** (self.bits - 1)

    def _number(self, code: int) -> float:
        """The number with a pattern that has no sign."""
        exponent, fraction = divmod(code, 2**self.mantissa)
        if exponent == 0:
            return fraction * 2.0 ** (1 - self.bias - self.mantissa)
        return (2**self.mantissa + fraction) * 2.0 ** (exponent - self.bias - self.mantissa)


def power_below(values: Tensor) -> Tensor:
    """The largest power of two in the magnitude of each float32 or float64 number; 0 for 0."""
    if values.dtype is torch.float64:
        return (values.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    return (values.view(torch.int32) & 0x7F80_0000).view(torch.float32)


@functools.cache
def _points(floats: Floats) -> Tensor:
    """The number of every pattern, NaN where there is none."""
    positive = torch.full((2 ** (floats.bits - 1),), torch.nan, device="cpu")
    found = floats.magnitudes[::-1]
    positive[: floats.last + 1] = torch.tensor([0.0, *found], device="cpu")
    return torch.cat((positive, -positive))
