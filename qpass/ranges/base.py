"""What a range is: scales of activations from how often each value was seen."""

from __future__ import annotations

import abc
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.registry import Registry

# magnitudes of 2^-60 to 2^60, each octave in so many bins
OCTAVES, PARTS = 60, 64
BINS = 2 * OCTAVES * PARTS + 1


@final
class Seen:
    """How often values of each size were read, and how much their errors cost; sums in float64.

    Bins go by sign and magnitude, 1% wide; `low` and `high` are exact. Values of dynamic grids are
    counted as shares of the extreme of their block, whose square is part of their cost.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.counts = torch.zeros(2 * BINS, dtype=torch.float64, device="cpu")
        self.costs = torch.zeros_like(self.counts)

    def add(self, values: Tensor, costs: Tensor) -> None:
        """Count finite `values`, whose squared errors cost `costs`."""
        if not values.numel():
            return
        flat = values.reshape(-1).double()
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        octaves = flat.abs().clamp(2.0**-OCTAVES, 2.0**OCTAVES).log2() + OCTAVES
        at = (octaves * PARTS).round().long() + BINS * (flat < 0)
        self.counts += torch.bincount(at, minlength=2 * BINS)
        self.costs += torch.bincount(at, costs.reshape(-1).double(), 2 * BINS)

    @property
    def values(self) -> Tensor:
        """The value that each bin stands for, in float64."""
        octaves = torch.arange(BINS, dtype=torch.float64, device="cpu") / PARTS - OCTAVES
        sizes = 2.0**octaves
        sizes[0] = 0.0
        return torch.cat((sizes, -sizes)).clamp(self.low, self.high)


class Range(abc.ABC):
    """A way to choose the scale of a static grid, or the clip of a dynamic one."""

    name: str
    # whether it also says where dynamic grids end
    dynamic: bool

    @abc.abstractmethod
    def choose(self, seen: Seen, spec: QuantSpec) -> QuantSpec:
        """`spec` with a scale, or a clip where it is dynamic."""


RANGES: Registry[Range] = Registry("range", "qpass.ranges")
