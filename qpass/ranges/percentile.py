"""All but a few values: what a calibrated int8 deployment has used since its beginnings.

Wu et al., Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation,
2020, section 4: 99.99 percent is the mildest of the shares they compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from qpass.formats import QuantSpec, spanning
from qpass.ranges.base import RANGES, Range, Seen

SHARE = 0.9999


@final
@dataclass(frozen=True, slots=True)
class Percentile(Range):
    """The share of values inside; asymmetric grids leave out half of the rest at each end."""

    name: str = "percentile"
    dynamic: bool = False

    def choose(self, seen: Seen, spec: QuantSpec) -> QuantSpec:
        values, order = (seen.values.abs() if spec.symmetric else seen.values).sort()
        below = seen.counts[order].cumsum(0)
        outside = (1 - SHARE) * float(below[-1])
        if spec.symmetric:
            high = float(values[torch.searchsorted(below, float(below[-1]) - outside)])
            return spanning(spec, max(seen.low, -high), min(seen.high, high))
        low = values[torch.searchsorted(below, outside / 2)]
        high = values[torch.searchsorted(below, float(below[-1]) - outside / 2)]
        return spanning(spec, max(seen.low, float(low)), min(seen.high, float(high)))


RANGES.add(Percentile())
