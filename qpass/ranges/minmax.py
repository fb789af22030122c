"""The whole range: nothing that was seen is clipped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import final

from qpass.formats import QuantSpec, spanning
from qpass.ranges.base import RANGES, Range, Seen


@final
@dataclass(frozen=True, slots=True)
class MinMax(Range):
    """From the smallest value to the largest."""

    name: str = "minmax"
    dynamic: bool = True

    def choose(self, seen: Seen, spec: QuantSpec) -> QuantSpec:
        if spec.dynamic:
            return dataclasses.replace(spec, clip=1.0)
        return spanning(spec, seen.low, seen.high)


RANGES.add(MinMax())
