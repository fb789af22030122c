"""The Hessian is checked, shrunk as held-out samples ask, and factored to the last bit."""

import pytest
import torch

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS, Rounding, Statistic
from qpass.rounding.hessian import Curvature, best_shrinkage, factored, shrunk, solve_unit
from tests.rounding.layers import inputs, layer, statistics

K = 96
ROUNDS = 1e-12  # float64, widths of a hundred
INFORMED = [rounding for rounding in ROUNDINGS if rounding.needs]


@pytest.mark.parametrize("k", [0, 1, 5, 128, 129, 300])
def test_a_factor_gives_the_hessian_back(k: int):
    x = inputs(k, 2 * k + 1, 1)
    h = shrunk(x.T @ x, 0.01)
    factor = factored(h)
    assert torch.equal(factor.upper_kk, factor.upper_kk.triu())
    assert torch.equal(factor.upper_kk.diagonal(), torch.ones(k, dtype=torch.float64))
    back = factor.upper_kk * factor.pivots_k @ factor.upper_kk.T
    assert torch.allclose(back, h, rtol=0, atol=ROUNDS)


def test_threads_do_not_change_a_bit_of_a_factor():
    x = inputs(700, 1500, 1)
    h = shrunk(x.T @ x, 0.01)
    one = factored(h)
    torch.set_num_threads(2)
    two = factored(h)
    torch.set_num_threads(1)
    assert torch.equal(one.upper_kk, two.upper_kk)
    assert torch.equal(one.pivots_k, two.pivots_k)


def test_held_out_samples_decide_how_much_is_believed():
    few, many = inputs(K, K // 2, 1), inputs(K, 100 * K, 1)
    halves = lambda x: (x[1::2].T @ x[1::2], x[::2].T @ x[::2])  # noqa: E731
    assert best_shrinkage(*halves(many)) <= 0.03
    assert best_shrinkage(*halves(few)) >= 0.1
    plain = inputs(K, 2 * K, 1, correlated=False)
    assert best_shrinkage(*halves(plain)) >= 0.3


@pytest.mark.parametrize("rows", [2, 6, 20, 200])
@pytest.mark.parametrize("loud", [1.0, 1e3])
def test_few_and_uneven_samples_leave_it_positive(rows: int, loud: float):
    # one column is loud in one half of the samples, all move together, and sums are of float32
    x = (inputs(1, rows, 1) + 0.01 * inputs(K, rows, 2)).float()
    x[: rows // 2, 3] *= loud
    h, held = ((y.T @ y).double() for y in (x, x[rows // 2 :]))
    found = Curvature.of({Statistic.HESSIAN: h, Statistic.HELD_HESSIAN: held}, K)
    assert (factored(found.h_kk).pivots_k > 0).all()


def test_columns_without_inputs_cost_a_little():
    x = inputs(K, 4 * K, 1)
    x[:, 7] = 0
    h = Curvature.of(statistics(x, 4), K).h_kk
    assert h[7, 7] > 0
    assert torch.equal(h[7, :7], torch.zeros(7, dtype=torch.float64))
    assert torch.equal(
        Curvature.of(statistics(0 * x, 4), K).h_kk, torch.eye(K, dtype=torch.float64)
    )


@pytest.mark.parametrize("rounding", INFORMED, ids=lambda r: r.name)
def test_statistics_that_cannot_be_are_refused(rounding: Rounding):
    w, spec = layer(8, K, 300, 1), QuantSpec("int4", 32, scale_format="float16")
    good = dict(w.stats)
    for statistic in sorted(rounding.needs, key=lambda s: s.name):
        found = good[statistic]
        broken = found.clone()
        broken[2, 3] = torch.nan
        absent = {key: value for key, value in good.items() if key is not statistic}
        cases = [
            ({**good, statistic: broken}, "NaN"),
            ({**good, statistic: found[:, :-1]}, "shape"),
        ]
        # without a half that is held apart nothing is judged on it
        if statistic not in (Statistic.HELD_HESSIAN, Statistic.HELD_CROSS):
            cases.append((absent, "missing"))
        if "HESSIAN" in statistic.name:
            cases.append(({**good, statistic: -found}, "semi-definite"))
            lopsided = found.clone()
            lopsided[0, 1] += found.diagonal().max()
            cases.append(({**good, statistic: lopsided}, "symmetric"))
        for stats, why in cases:
            with pytest.raises(BadInput, match=f"{statistic.name}.*{why}"):
                rounding.round(w.weight, spec, stats)


def test_an_indefinite_hessian_with_a_plausible_diagonal_is_refused():
    q, _ = torch.linalg.qr(inputs(K, K, 3, correlated=False))
    values = torch.ones(K, dtype=torch.float64)
    values[:8] = -3
    h = q * values @ q.T
    h = h + 3 * h.abs().max() * torch.eye(K, dtype=torch.float64) * 0
    stats = {**layer(8, K, 300, 1).stats, Statistic.HESSIAN: h, Statistic.HELD_HESSIAN: h / 2}
    with pytest.raises(BadInput, match="semi-definite"):
        ROUNDINGS["gptq"].round(layer(8, K, 300, 1).weight, QuantSpec("int4"), stats)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 128, 129, 300])
def test_triangles_are_solved(size: int):
    generator = torch.Generator().manual_seed(size)
    strict = torch.randn(size, size, generator=generator, dtype=torch.float64).triu(1) / size**0.5
    upper, given = strict + torch.eye(size, dtype=torch.float64), torch.randn(size, 3).double()
    for transposed in (False, True):
        matrix = upper.T if transposed else upper
        solved = solve_unit(upper, given, transposed=transposed)
        assert torch.allclose(matrix @ solved, given, atol=1e-9)


def test_weights_of_one_value_share_what_is_made_of_its_statistics(monkeypatch):
    x = torch.randn(64, 16, dtype=torch.float64)
    stats = {Statistic.HESSIAN: x.T @ x, Statistic.HELD_HESSIAN: x[::2].T @ x[::2]}
    first = Curvature.of(stats, 16)
    assert Curvature.of(dict(stats), 16) is first
    order = first.weights_k.argsort()
    assert first.factor(order) is first.factor(order.clone())
    assert Curvature.of(stats, 16, 0.5) is not first
    stats[Statistic.HESSIAN].mul_(2)
    again = Curvature.of(stats, 16)
    assert again is not first
    assert again.unit == pytest.approx(2 * first.unit, rel=0.5)
