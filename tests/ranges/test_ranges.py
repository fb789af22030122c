"""Do ranges lie where they are said to lie, and cost no more than any other?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantSpec, spanning
from qpass.ops import fake_quantize
from qpass.ranges import RANGES, Seen


def values(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 500, generator=g, dtype=torch.float64)
    if kind == "shifted":
        x = x.abs() * 3 - 1
    if kind == "outliers":
        x[0, :3] = torch.tensor([900.0, -700.0, 300.0])
    if kind == "zeros":
        x = torch.zeros_like(x)
    return x


def seen(x: Tensor, cost: Tensor | None = None) -> Seen:
    found = Seen()
    cost = torch.ones_like(x) if cost is None else cost
    for part, weights in zip(x.split(16), cost.split(16), strict=True):
        found.add(part, weights)
    return found


KINDS = ("normal", "shifted", "outliers", "zeros")
SPECS = [
    QuantSpec(name, "tensor", symmetric=symmetric)
    for name, symmetric in (("int4", True), ("int8", True), ("int8", False), ("e4m3", True))
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [found.name for found in RANGES])
def test_every_range_is_a_scale(name: str, kind: str, spec: QuantSpec) -> None:
    found = RANGES[name].choose(seen(values(kind)), spec)
    assert found.scale is not None
    assert (found.format, found.symmetric) == (spec.format, spec.symmetric)
    assert float(torch.tensor(found.scale)) == found.scale


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "shifted", "outliers"])
def test_least_cost_is_the_least(kind: str, spec: QuantSpec) -> None:
    x = values(kind)
    cost = torch.ones_like(x)
    if kind == "outliers":
        cost[0] = 1e-4

    def lost(spec: QuantSpec) -> float:
        return float(((fake_quantize(x, spec) - x).square() * cost).sum())

    got = lost(RANGES["mse"].choose(seen(x, cost), spec))
    for share in (1.0, 0.9, 0.8, 0.6, 0.4, 0.1, 0.01):
        other = spanning(spec, share * float(x.min()), share * float(x.max()))
        # bins are 1.6% wide
        assert got <= 1.03 * lost(other)


def test_errors_of_rows_that_cost_much_are_small() -> None:
    x, cost = values("outliers"), torch.ones(64, 500, dtype=torch.float64)
    spec = SPECS[1]
    cost[0] = 1e6
    dear = RANGES["mse"].choose(seen(x, cost), spec)
    cost[0] = 1e-6
    cheap = RANGES["mse"].choose(seen(x, cost), spec)
    assert dear.scale is not None
    assert cheap.scale is not None
    assert dear.scale > 10 * cheap.scale


def test_minmax_clips_nothing_and_percentile_little() -> None:
    x = values("outliers")
    whole = RANGES["minmax"].choose(seen(x), SPECS[1])
    assert whole.scale == pytest.approx(900 / 127)
    most = RANGES["percentile"].choose(seen(x), SPECS[1])
    assert most.scale is not None
    outside = (x.abs() > 127.5 * most.scale).double().mean()
    assert 2e-5 < float(outside) < 3e-4
    both = RANGES["percentile"].choose(seen(values("shifted")), SPECS[2])
    assert both.scale is not None
    assert both.zero < -60


@pytest.mark.parametrize("bits", [4, 8])
def test_the_clip_of_dynamic_rows_lowers_their_error(bits: int) -> None:
    spec, x = QuantSpec(f"int{bits}", dynamic=True), values("normal")
    extreme = x.abs().amax(1, keepdim=True)
    found = seen(x / extreme, extreme.square().expand(x.shape))
    clip = RANGES["mse"].choose(found, spec).clip

    def lost(clip: float) -> float:
        rows = fake_quantize(x, QuantSpec(spec.format, dynamic=True, clip=clip))
        return float((rows - x).square().sum())

    assert all(lost(clip) <= 1.02 * lost(other) for other in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7))
    assert (clip < 0.95) == (bits == 4)
    assert RANGES["minmax"].choose(found, spec).clip == 1
