"""E8M0 scales: powers of two, those of the microscaling (MX) formats.

OCP Microscaling Formats (MX) Specification, version 1.0 (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats.floats import power_below
from qpass.formats.scales.base import SCALES, ScaleFormat

# the format's own smallest, 2^-127, is subnormal in float32
SMALLEST = 2.0**-126


@final
@dataclass(frozen=True, slots=True)
class E8M0(ScaleFormat):
    """A scale of 0, which only zeros have, is stored as the smallest."""

    name: str = "e8m0"
    dtype: torch.dtype = torch.float8_e8m0fnu
    signed: bool = False
    one_factor: bool = True
    needs_factor: bool = False
    top: float = 2.0**127

    def stored(self, x: Tensor) -> Tensor:
        x = x.float().clamp(SMALLEST, self.top)
        lower = power_below(x)
        return torch.where(x - lower > 0.5 * lower, 2 * lower, lower).clamp(max=self.top)


SCALES.add(E8M0())
