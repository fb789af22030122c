"""E4M3 scales: those of NVFP4, positive, up to 448; a factor of the tensor puts them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats.scales.base import SCALES, ScaleFormat


@final
@dataclass(frozen=True, slots=True)
class E4M3Scales(ScaleFormat):
    name: str = "e4m3"
    dtype: torch.dtype = torch.float8_e4m3fn
    signed: bool = False
    one_factor: bool = True
    needs_factor: bool = True
    top: float = 448.0

    def stored(self, x: Tensor) -> Tensor:
        return x.float().clamp(0.0, self.top).to(self.dtype).float()


SCALES.add(E4M3Scales())
