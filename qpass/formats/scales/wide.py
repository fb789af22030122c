"""Scales that are floats of 16 or 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats.scales.base import SCALES, ScaleFormat


@final
@dataclass(frozen=True, slots=True)
class Wide(ScaleFormat):
    """Every number of a floating type that torch computes with."""

    name: str
    dtype: torch.dtype
    signed: bool = True
    one_factor: bool = False
    needs_factor: bool = False

    @property
    def top(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.finfo(self.dtype).max

    def stored(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).float()


FLOAT32 = SCALES.add(Wide("float32", torch.float32))
FLOAT16 = SCALES.add(Wide("float16", torch.float16))
BFLOAT16 = SCALES.add(Wide("bfloat16", torch.bfloat16))
