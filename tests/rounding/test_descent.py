"""Coordinate descent never raises the cost, whatever it starts from."""

import itertools

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.rounding.columns import Columns, round_columns
from qpass.rounding.descent import descend
from qpass.rounding.hessian import Curvature
from tests.rounding.layers import layer, seeded

SPECS = [
    QuantSpec("int4", 32, scale_format="float16", symmetric=False),
    QuantSpec("int4", 64, scale_format="float16"),
    QuantSpec("int4"),
    QuantSpec("int4", symmetric=False),
    QuantSpec("int4", "tensor"),
    QuantSpec("int8", "tensor", symmetric=False),
]
SUM_NOISE = 1e-4  # sums in float32
K = 192


def cost(sheet: Columns, points_kn: Tensor, h_kk: Tensor) -> Tensor:
    """The cost of each row; of all together where they share scales."""
    lost_nk = (sheet.want_kn - points_kn).double().t()
    cost_n = ((lost_nk @ h_kk) * lost_nk).sum(1)
    return cost_n.sum().reshape(1) if sheet.shared else cost_n


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("start", ["nearest", "anywhere"])
@pytest.mark.parametrize("refit", [True, False])
def test_no_sweep_raises_the_cost(spec: QuantSpec, start: str, refit: bool):
    one = layer(20, K, 800, 4)
    h = Curvature.of(one.stats, K).h_kk
    costs: list[Tensor] = []

    def solve(sheet: Columns) -> Tensor:
        points = sheet.rounded()
        if start == "anywhere":
            noisy = sheet.want_kn + 0.5 * torch.randn(sheet.want_kn.shape, generator=seeded(1))
            wanted, sheet.want_kn = sheet.want_kn, noisy
            points = sheet.rounded()
            sheet.want_kn = wanted
        scales = sheet.scale_gn.clone()
        costs.append(cost(sheet, points, h))
        for _ in range(4):
            points = descend(sheet, h, points, 1, refit=refit)
            costs.append(cost(sheet, points, h))
        assert torch.equal(scales, sheet.scale_gn) is not refit
        return points

    round_columns(one.weight, spec, h.diagonal(), solve)
    for before, after in itertools.pairwise(costs):
        assert (after <= before * (1 + SUM_NOISE)).all()
    assert costs[-1].sum() < 0.8 * costs[0].sum()


def test_the_end_is_a_minimum_in_every_entry():
    one = layer(6, 24, 200, 4)
    spec = QuantSpec("int4", 8)
    h = Curvature.of(one.stats, 24).h_kk

    def solve(sheet: Columns) -> Tensor:
        points = descend(sheet, h, sheet.rounded(), 50, refit=False)
        least = cost(sheet, points, h)
        for column in range(24):
            for step in (-1, 1):
                other = points.clone()
                other[column] = sheet.nearest(
                    column, points[column] + step * sheet.scale_gn[column // 8]
                )
                assert (cost(sheet, other, h) >= least * (1 - SUM_NOISE)).all()
        return points

    round_columns(one.weight, spec, h.diagonal(), solve)


def test_no_sweep_changes_nothing():
    one = layer(6, 24, 200, 4)
    h = Curvature.of(one.stats, 24).h_kk

    def solve(sheet: Columns) -> Tensor:
        points = sheet.rounded()
        assert descend(sheet, h, points, 0) is points
        return points

    round_columns(one.weight, QuantSpec("int4", 8), h.diagonal(), solve)
