"""Babai, LDLQ, GPFQ, COMQ and corrected weights, each against what its paper says of it."""

import itertools

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS, Rounding, Statistic, Stats
from qpass.rounding.columns import Columns, round_columns
from qpass.rounding.feedback import feed_back
from qpass.rounding.gpfq import Gpfq
from qpass.rounding.gptq import Gptq, Order, column_order
from qpass.rounding.hessian import Curvature, factored, shrunk
from qpass.rounding.ldlq import Ldlq, blocked
from qpass.rounding.minmax import MinMax
from qpass.rounding.shift import corrected
from qpass.rounding.yaqa import Yaqa
from tests.rounding.layers import inputs, layer, seeded, statistics
from tests.rounding.test_gptq import scales_of

G32 = QuantSpec("int4", 32, scale_format="float16")
K = 96
ROUNDS = 1e-10  # float64, conditions of some thousands
INFORMED = [rounding for rounding in ROUNDINGS if Statistic.HESSIAN in rounding.needs]


def babai(weight: Tensor, basis: Tensor, scales: tuple[Tensor, Tensor], spec: QuantSpec) -> Tensor:
    """Nearest plane for `|B (w - q)|`, B upper triangular `[k, k]`: from the last column on."""
    n, k = weight.shape
    length = k // scales[0].shape[1]
    codes = torch.empty(n, k, dtype=torch.float64)
    target = weight @ basis.T  # what is left of `B w`, row by row of B
    for i in reversed(range(k)):
        scale, offset = (t[:, i // length].double() for t in scales)
        center = target[:, i] / basis[i, i]
        q = ((center - offset) / scale).round().clamp(spec.codes.low, spec.codes.high)
        codes[:, i] = q
        target -= (q * scale + offset).unsqueeze(1) * basis[:, i]
    return codes


@pytest.mark.parametrize("spec", [G32, QuantSpec("int4", 16, symmetric=False), QuantSpec("int3")])
def test_reversed_gptq_is_babai(spec: QuantSpec):
    # GPTQ from the last column on: that of the reversed weight and inputs
    one = layer(20, K, 500, 1)
    w = one.weight.float().double()
    q = Gptq(order="memory", static=True).round(w.flip(1), spec, statistics(one.x.flip(1), 20))
    h = Curvature.of(one.stats, K).h_kk
    basis = torch.linalg.cholesky(h, upper=True)
    scales = scales_of(q)
    codes = babai(w, basis, (scales[0].flip(1), scales[1].flip(1)), spec)
    assert torch.equal(q.codes_nk.flip(1).double(), codes)


@pytest.mark.parametrize("order", ["memory", "diagonal", "groups"])
def test_no_error_above_babais_bound_without_clipping(order: Order):
    one = layer(40, K, 500, 2)
    spec = QuantSpec("int8", 32)
    cost = Curvature.of(one.stats, K)
    columns = column_order(cost.weights_k, order, spec)
    factor = factored(cost.h_kk[columns][:, columns])

    def solve(sheet: Columns) -> Tensor:
        sheet.scale_gn *= 1.5  # room for what the feedback adds
        return feed_back(sheet, factor, columns.tolist(), fit=False)

    q = round_columns(one.weight, spec, cost.weights_k, solve)
    assert q.codes_nk.abs().max() < 127
    steps = scales_of(q)[0].double().repeat_interleave(32, 1)
    bound = (factor.pivots_k * steps[:, columns].square()).sum(1) / 4

    def error(points: Tensor) -> Tensor:
        lost = points.double() - one.weight
        return ((lost @ cost.h_kk) * lost).sum(1)

    assert (error(q.dequantize(torch.float64)) <= bound * (1 + 1e-6)).all()
    # errors of uniform size are a third of the largest
    found = error(q.dequantize(torch.float64)).sum()
    assert 0.25 * bound.sum() < found < 0.45 * bound.sum()
    assert error((one.weight / steps).round() * steps).sum() > 1.5 * found


def test_ldlq_is_gptq_in_memory_order():
    one = layer(20, K, 500, 1)
    a = ROUNDINGS["ldlq"].round(one.weight, G32, one.stats)
    b = Gptq(order="memory", static=True).round(one.weight, G32, one.stats)
    assert torch.equal(a.codes_nk, b.codes_nk)


@pytest.mark.parametrize("joint", [1, 2, 8, 7, 96])
def test_a_block_factor_gives_the_hessian_back(joint: int):
    h = Curvature.of(layer(4, K, 500, 1).stats, K).h_kk
    plain = factored(h)
    factor = blocked(plain, joint)
    inverse = torch.linalg.inv(factor.upper_kk)
    middle = inverse @ h @ inverse.T
    for start in range(0, K, joint):
        block = slice(start, start + joint)
        corner = factor.upper_kk[block, block]
        assert torch.allclose(corner, torch.eye(len(corner), dtype=torch.float64), atol=ROUNDS)
        assert torch.allclose(middle[block, block].diagonal(), factor.pivots_k[block])
        middle[block, block] = 0
    assert middle.abs().max() < ROUNDS


def test_larger_blocks_lose_some_of_the_feedback():
    one = layer(40, K, 900, 1)
    errors = [
        one.error(Ldlq(joint=joint).round(one.weight, G32, one.stats).dequantize(torch.float64))
        for joint in (1, 8, 96)
    ]
    assert errors[0] < errors[1] < errors[2]
    plain = ROUNDINGS["weighted"].round(one.weight, G32, one.stats).dequantize(torch.float64)
    assert errors[2] == pytest.approx(one.error(plain), rel=1e-3)


@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_gpfq_is_the_recursion_on_samples(drift: float):
    one = layer(12, 48, 300, 3)
    x_float = one.x
    x = (
        x_float
        + drift * one.x.roll(1, 1)
        + drift * torch.randn(x_float.shape, generator=seeded(4), dtype=torch.float64)
    )
    w = one.weight.float().double()
    spec = QuantSpec("int4", 16)
    given = statistics(x, 12, x_float)
    del given[Statistic.HELD_HESSIAN]
    q = Gpfq(shrinkage=0.0).round(w, spec, given)
    scales = scales_of(q)[0].double()
    error = torch.zeros(12, 300, dtype=torch.float64)
    for t in range(48):
        path = error + w[:, [t]] * x_float[:, t]
        code = (path @ x[:, t] / x[:, t].square().sum() / scales[:, t // 16]).round().clamp(-8, 7)
        assert torch.equal(code, q.codes_nk[:, t].double()), t
        error = path - (code * scales[:, t // 16]).unsqueeze(1) * x[:, t]


def test_corrected_weights_are_least_squares_for_the_inputs_seen():
    one = layer(12, K, 900, 3)
    x = one.x + 0.3 * one.x.roll(1, 1)
    given = statistics(x, 12, one.x)
    del given[Statistic.HELD_HESSIAN]
    best = torch.linalg.lstsq(x, one.x @ one.weight.T).solution.T
    found = corrected(one.weight, Curvature.of(given, K, 1e-6), given)
    lost = ((found - best) @ x.T).square().sum() / ((one.weight - best) @ x.T).square().sum()
    assert lost < 1e-4
    same = corrected(one.weight, Curvature.of(one.stats, K), one.stats)
    assert torch.allclose(same, one.weight, rtol=0, atol=ROUNDS)


def test_correction_pays_on_inputs_it_never_saw():
    one = layer(24, K, 2000, 3)
    seen = lambda x: x + 0.3 * x.roll(1, 1)  # noqa: E731
    fresh = inputs(K, 2000, 3, draw=1)
    given = statistics(seen(one.x), 24, one.x)
    errors = []
    for name in ("gptq-descent", "gptq-cross"):
        q = ROUNDINGS[name].round(one.weight, QuantSpec("int4", 32), given)
        lost = seen(fresh) @ q.dequantize(torch.float64).T - fresh @ one.weight.T
        errors.append(lost.square().sum().item())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("tokens", [16, 40, 90, 200])
def test_only_as_much_of_the_correction_is_taken_as_held_out_samples_ask_for(tokens: int):
    one = layer(24, K, tokens, 3)
    fresh = inputs(K, 2000, 3, draw=1)

    def noisy(x: Tensor, draw: int) -> Tensor:
        return x + 0.03 * x.std() * torch.randn(x.shape, generator=seeded(draw), dtype=x.dtype)

    seen, unseen = noisy(one.x, 2), noisy(fresh, 3)
    given = statistics(seen, 24, one.x)
    whole = {name: value for name, value in given.items() if name is not Statistic.HELD_CROSS}

    def error(name: str, stats: Stats) -> float:
        q = ROUNDINGS[name].round(one.weight, QuantSpec("int4", 32), stats)
        lost = unseen @ q.dequantize(torch.float64).T - fresh @ one.weight.T
        return lost.square().sum().item()

    plain = error("gptq-descent", given)
    assert error("gptq-cross", given) < 1.01 * plain
    # all of it costs more than none
    assert error("gptq-cross", whole) > 1.05 * plain


@pytest.mark.parametrize("rounding", INFORMED, ids=lambda r: r.name)
@pytest.mark.parametrize(
    "spec",
    [
        G32,
        QuantSpec("int4", 16, symmetric=False),
        QuantSpec("int4", "tensor"),
        QuantSpec("e2m1", 32, scale_format="e8m0"),
        QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True),
    ],
    ids=str,
)
def test_with_an_identity_every_code_is_the_nearest(rounding: Rounding, spec: QuantSpec):
    w = layer(10, 64, 9, 1).weight
    eye = torch.eye(64, dtype=torch.float64)
    given = {
        **statistics(100 * eye, 10),
        Statistic.HELD_HESSIAN: 5000 * eye,
        Statistic.OUTPUT_HESSIAN: torch.eye(10, dtype=torch.float64),
    }
    q = rounding.round(w, spec, given)
    scale, offset = (t.repeat_interleave(64 // t.shape[1], 1).double() for t in scales_of(q))
    points = torch.sort(spec.codes.decode(spec.codes.codes()).double().unique()).values
    near = ((w - offset) / scale).unsqueeze(2).sub(points).abs().amin(2)
    got = (q.dequantize(torch.float64) - w).div(scale).abs()
    assert (got <= near + 1e-4).all()


@pytest.mark.parametrize("name", ["ldlq", "comq", "gptq", "gptq-descent"])
def test_better_than_nearest_on_rows_it_never_saw(name: str):
    one = layer(24, 160, 1600, 5)
    fresh = inputs(160, 2000, 5, draw=1)
    for spec in (
        G32,
        QuantSpec("int2", 32, scale_format="float16", symmetric=False),
        QuantSpec("e2m1", 32, scale_format="e8m0"),
        QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True),
    ):
        q = ROUNDINGS[name].round(one.weight, spec, one.stats).dequantize(torch.float64)
        plain = ROUNDINGS["nearest"].round(one.weight, spec, one.stats).dequantize(torch.float64)
        assert one.error(q, fresh) < 0.8 * one.error(plain, fresh), spec


def two_sided(
    weight: Tensor, h: Tensor, g: Tensor, scales: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """The codes of YAQA's formula, an entry at a time, and what they cost."""
    n, k = weight.shape
    along_k, along_n = factored(h).upper_kk, factored(g).upper_kk
    eye_k, eye_n = torch.eye(k, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    lost = torch.zeros(n, k, dtype=torch.float64)
    codes = torch.zeros(n, k, dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            # rows and columns strictly before, and both
            back = (along_n - eye_n).T @ lost @ (along_k - eye_k)
            back = back + (along_n - eye_n).T @ lost + lost @ (along_k - eye_k)
            aim = weight[i, j] + back[i, j]
            codes[i, j] = (aim / scales[i, j]).round().clamp(spec.codes.low, spec.codes.high)
            lost[i, j] = weight[i, j] - codes[i, j] * scales[i, j]
    return codes, ((lost @ h @ lost.T) * g).sum()


def test_yaqa_is_two_sided_feedback():
    one = layer(12, 32, 200, 1)
    spec = QuantSpec("int3", 16, scale_format="float16")
    w = one.weight.float().double()
    w = w * 2.0 ** torch.tensor([[-15], [-14], [-16]] * 4)  # scaled up for float16, each by its own
    q = Yaqa(joint=1, order="memory").round(w, spec, one.stats)
    scales = scales_of(q)[0].double().repeat_interleave(16, 1)
    g = shrunk(one.stats[Statistic.OUTPUT_HESSIAN], 0.1)
    expected, _ = two_sided(w, Curvature.of(one.stats, 32).h_kk, g, scales, spec)
    assert torch.equal(q.codes_nk.double(), expected)
    assert len(q.row_scales_n.unique()) > 1


def test_yaqa_with_plain_outputs_is_gptq():
    one = layer(70, 64, 300, 1)
    given = {**one.stats, Statistic.OUTPUT_HESSIAN: 3 * torch.eye(70, dtype=torch.float64)}
    a, b = (ROUNDINGS[name].round(one.weight, G32, given) for name in ("yaqa", "gptq"))
    assert torch.equal(a.codes_nk, b.codes_nk)


def test_yaqa_costs_less_on_both_sides():
    one = layer(70, 64, 300, 3)
    g = inputs(70, 900, 11)
    given = {**one.stats, Statistic.OUTPUT_HESSIAN: g.T @ g}
    costs = []
    h = Curvature.of(given, 64).h_kk
    spec = QuantSpec("int8", 32, scale_format="float16")
    for rounding in (Yaqa(joint=1), Yaqa(), ROUNDINGS["gptq"]):
        lost = rounding.round(one.weight, spec, given).dequantize(torch.float64) - one.weight
        costs.append(((lost @ h @ lost.T) * shrunk(g.T @ g, 0.1)).sum().item())
    assert costs[0] < costs[1] < 0.9 * costs[2]


@pytest.mark.parametrize("spec", [G32, QuantSpec("e2m1", 32, scale_format="e8m0")], ids=str)
def test_no_move_raises_the_largest_error(spec: QuantSpec):
    one = layer(16, K, 400, 1)
    x = one.stats[Statistic.SAMPLES].double()
    h = Curvature.of(one.stats, K).h_kk
    largest, costs = [], []
    for sweeps in range(4):
        rounding = MinMax(sweeps=sweeps, allowance=0.3)
        lost = rounding.round(one.weight, spec, one.stats).dequantize(torch.float64) - one.weight
        largest.append((lost @ x.T).abs().amax(1))
        costs.append(((lost @ h) * lost).sum(1))
    for before, after in itertools.pairwise(largest):
        assert (after <= before * (1 + 1e-5)).all()
    assert largest[-1].sum() < 0.85 * largest[0].sum()
    assert (costs[-1] <= 1.3 * costs[0] * (1 + 1e-4)).all()
    start = Gptq(static=True).round(one.weight, spec, one.stats)
    assert torch.equal(start.codes_nk, MinMax(sweeps=0).round(one.weight, spec, one.stats).codes_nk)
