"""Is what gradients change at first the codes that were given, and in the end what is stored?"""

from __future__ import annotations

import pytest
import torch

from qpass.formats import QuantSpec
from qpass.refine.soft import SoftWeight, cells
from qpass.rounding import ROUNDINGS
from tests.rounding.test_rounding import EACH_SPEC, random_weight

N, K = 6, 128


@EACH_SPEC
def test_codes_are_read_as_they_were_and_as_they_will_be(spec: QuantSpec) -> None:
    weight = random_weight(N, K, 1)
    start = ROUNDINGS["nearest"].round(weight, spec, {})
    soft = SoftWeight(start, weight, torch.float32)
    assert torch.equal(soft.value(), start.dequantize(torch.float32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in (soft.place_ngl, *soft.scales):
            values += 0.2 * torch.randn(values.shape, generator=generator)
    changed = soft.codes()
    assert not torch.equal(changed.codes_nk, start.codes_nk)
    assert torch.equal(soft.value(), changed.dequantize(torch.float32))


@EACH_SPEC
def test_gradients_reach_places_scales_and_offsets(spec: QuantSpec) -> None:
    weight = random_weight(N, K, 2)
    soft = SoftWeight(ROUNDINGS["nearest"].round(weight, spec, {}), weight, torch.float32)
    (soft.value() - weight).square().sum().backward()
    assert len(soft.scales) == (1 if spec.symmetric else 2)
    for values in (soft.place_ngl, *soft.scales):
        assert values.grad is not None
        assert bool((values.grad != 0).any())


@pytest.mark.parametrize("format", ["int3", "e2m1", "e4m3"])
def test_a_cell_holds_what_is_rounded_to_its_point(format: str) -> None:
    codes = QuantSpec(format).codes
    points = codes.decode(codes.codes())
    low, high = cells(points, codes)
    for share in (0.01, 0.5, 0.99):
        inside = torch.lerp(low, high, share)
        assert torch.equal(codes.round_(inside.clone()), points)
