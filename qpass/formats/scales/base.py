"""What a scale format is: which numbers a scale can be."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from qpass.registry import Registry


class ScaleFormat(abc.ABC):
    """A set of numbers that scales are rounded to, and the type that stores them.

    A `signed` format also holds offsets. `top` is the largest scale. Rows of most formats have
    factors of their own beside the scales of their blocks; with `one_factor` they share one, which
    is 1 unless the format `needs_factor` to follow a tensor's magnitude.
    """

    name: str
    dtype: torch.dtype
    signed: bool
    one_factor: bool
    needs_factor: bool
    top: float

    @abc.abstractmethod
    def stored(self, x: Tensor) -> Tensor:
        """The number that stores each finite `x`, in float32."""

    @property
    def bits(self) -> int:
        """How many bits a scale takes."""
        return 8 * self.dtype.itemsize

    def stored_below(self, x: Tensor) -> Tensor:
        """As `stored`, but rounded down."""
        near = self.stored(x)
        # 0.6 of the spacing: less would round back, more would skip a number
        lower = self.stored(near - 0.6 * torch.finfo(self.dtype).eps * near.abs())
        return torch.where(near > x, lower, near)

    def stored_above(self, x: Tensor) -> Tensor:
        """As `stored`, but rounded up, unless that would be beyond `top`."""
        near = self.stored(x)
        higher = self.stored(near + 0.6 * torch.finfo(self.dtype).eps * near.abs())
        return torch.where(near < x, higher, near)


SCALES: Registry[ScaleFormat] = Registry("scale format", "qpass.formats.scales")
