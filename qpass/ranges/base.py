"""What a range is: scales of activations from how often each value was seen."""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.registry import Registry

# a bin is a sign, an exponent and so many bits of a mantissa of float32
MANTISSA = 6
DROPPED = 23 - MANTISSA
BINS = 2 ** (1 + 8 + MANTISSA)


@final
class Seen:
    """How often values of each size were read, and how much their errors cost; sums in float64.

    Bins are at most 1.6% wide; `low` and `high` are exact. Values of dynamic grids are counted as
    shares of the extreme of their block, whose square is part of their cost.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64, device="cpu")
        self.costs = torch.zeros_like(self.counts)

    def add(self, values: Tensor, costs: Tensor) -> None:
        """Count finite `values`, whose squared errors cost `costs`."""
        if not values.numel():
            return
        flat = values.float().reshape(-1)
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        at = (flat.view(torch.int32) >> DROPPED) & (BINS - 1)
        self.counts += torch.bincount(at, minlength=BINS)
        self.costs += torch.bincount(at, costs.reshape(-1), BINS)

    @property
    def values(self) -> Tensor:
        """The middle of each bin, in float64."""
        at = torch.arange(BINS, dtype=torch.int64, device="cpu")
        at = torch.where(at < BINS // 2, at, at - BINS)
        bits = ((at << DROPPED) + (1 << DROPPED - 1)).to(torch.int32)
        # patterns of no finite number are never counted
        middle = bits.view(torch.float32).double().nan_to_num(0.0, 0.0, 0.0)
        return middle.clamp(self.low, self.high)


class Range(abc.ABC):
    """A way to choose the scale of a static grid, or the clip of a dynamic one."""

    name: str
    # whether it also says where dynamic grids end
    dynamic: bool

    @abc.abstractmethod
    def choose(self, seen: Seen, spec: QuantSpec) -> QuantSpec:
        """`spec` with a scale, or a clip where it is dynamic."""


RANGES: Registry[Range] = Registry("range", "qpass.ranges")
