"""Weighted scales: never worse than nearest's, better where columns differ, close to a search."""

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS
from qpass.rounding.grid import Grid, Scales, nearest_points
from qpass.rounding.nearest import fit_scales
from qpass.rounding.weighted import fit_weighted
from tests.rounding.layers import layer, seeded, statistics

SPECS = [
    QuantSpec("int4", 32, scale_format="float16", symmetric=False),
    QuantSpec("int4", 64, scale_format="float16"),
    QuantSpec("int4"),
    QuantSpec("int4", symmetric=False),
    QuantSpec("int4", "tensor"),
    QuantSpec("int8"),
    QuantSpec("int8", 32, scale_format="float16", symmetric=False),
]
SUM_NOISE = 1e-5  # sums in float32


def weighted_error(values: Tensor, weights: Tensor, grid: Grid, scales: Scales) -> Tensor:
    lost = nearest_points(values, grid, scales).double() - values.double()
    return (lost.square() * weights.double()).sum(1)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_the_scales_of_nearest(spec: QuantSpec, seed: int):
    one = layer(12, 192, 500, seed)
    error = lambda q: ((q - one.weight).square() * one.x.square().sum(0)).sum()  # noqa: E731
    found = ROUNDINGS["weighted"].round(one.weight, spec, one.stats).dequantize(torch.float64)
    plain = ROUNDINGS["nearest"].round(one.weight, spec, {}).dequantize(torch.float64)
    assert error(found) <= error(plain) * (1 + SUM_NOISE)
    if spec.codes.bits == 4 and spec.block != "tensor":
        assert error(found) < 0.9 * error(plain)


@pytest.mark.parametrize("symmetric", [True, False])
def test_close_to_a_dense_search(symmetric: bool):
    spec = QuantSpec("int4", 16, symmetric=symmetric)
    grid = Grid.of(spec)
    values = torch.randn(20, 16, generator=seeded(1))
    weights = torch.rand(20, 16, generator=seeded(2)).square()
    found = weighted_error(values, weights, grid, fit_weighted(values, weights, grid))
    plain = weighted_error(values, weights, grid, fit_scales(values, grid))
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    low, high = values.amin(1), values.amax(1)
    extreme = torch.where(-low > high, low, high)
    for keep in torch.linspace(0.2, 1.1, 120).tolist():
        if symmetric:
            trials = [Scales(keep * extreme / end, 0 * low) for end in (grid.low, grid.high)]
        else:
            scale = keep * (high - low) / (grid.high - grid.low)
            trials = [
                Scales(scale, low + place * (high - low) - scale * grid.low)
                for place in torch.linspace(-0.1, 0.6, 80).tolist()
            ]
        for trial in trials:
            best = torch.minimum(best, weighted_error(values, weights, grid, trial))
    # most of what an exhaustive search gains over the scales of nearest rounding
    assert (plain - found).sum() > 0.75 * (plain - best).sum()
    assert found.sum() < 1.12 * best.sum()


def test_weights_on_the_grid_keep_their_numbers():
    spec = QuantSpec("int4", 32, scale_format="float16", symmetric=False)
    w = ROUNDINGS["nearest"].round(layer(8, 96, 9, 1).weight, spec, {}).dequantize(torch.float32)
    stats = statistics(layer(8, 96, 300, 2).x, 8)
    for name in ("weighted", "gptq", "gptq-descent"):
        assert torch.equal(ROUNDINGS[name].round(w, spec, stats).dequantize(torch.float32), w)
