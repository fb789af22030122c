"""The range of least cost: clipping a few values against rounding all others coarsely.

Banner et al., Post-Training 4-Bit Quantization of Convolutional Networks for Rapid-Deployment,
2019 (ACIQ), with the cost of each error measured instead of a distribution assumed: the square of
the error of a value weighs what the weights that read it do, and what the model's outputs say of
its token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantSpec, spanning
from qpass.ranges.base import RANGES, Range, Seen

# ends as shares of the extremes: massive activations are hundreds of times what all others are
STATIC = tuple(0.93**i for i in range(100))
DYNAMIC = tuple(1 - 0.02 * i for i in range(26))


@final
@dataclass(frozen=True, slots=True)
class LeastCost(Range):
    """One end for dynamic and symmetric grids, both ends in turn for the others."""

    name: str = "mse"
    dynamic: bool = True

    def choose(self, seen: Seen, spec: QuantSpec) -> QuantSpec:
        if spec.dynamic:
            low, high = int(spec.codes.low), int(spec.codes.high)
            costs = {c: _cost(seen, c / high, low, high) for c in DYNAMIC}
            return dataclasses.replace(spec, clip=min(DYNAMIC, key=costs.__getitem__))
        low, high = seen.low, seen.high
        if spec.symmetric:
            return _best(seen, (spanning(spec, low * s, high * s) for s in STATIC))
        # a common share first, then each end by itself
        share = min(STATIC, key=lambda s: _static(seen, spanning(spec, low * s, high * s)))
        found = [
            spanning(spec, low * share * a, high * share * b)
            for a, b in (*((s, 1.0) for s in STATIC[:40]), *((1.0, s) for s in STATIC[:40]))
        ]
        return _best(seen, found)


def _best(seen: Seen, specs: Iterable[QuantSpec]) -> QuantSpec:
    return min(specs, key=lambda spec: _static(seen, spec))


def _static(seen: Seen, spec: QuantSpec) -> float:
    assert spec.scale is not None
    if not spec.integers:
        return _sum(seen, spec.codes.round_(seen.values / spec.scale) * spec.scale)
    first, last = spec.whole_range
    return _cost(seen, spec.scale, first - spec.zero, last - spec.zero)


def _cost(seen: Seen, step: float, first: int, last: int) -> float:
    return _sum(seen, (seen.values / step).round().clamp(first, last) * step)


def _sum(seen: Seen, points: Tensor) -> float:
    return float(torch.dot(seen.costs, (points - seen.values).square()))


RANGES.add(LeastCost())
