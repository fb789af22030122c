"""GPTQ against the algorithm as its paper has it, and on the inputs that make it go wrong."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding import ROUNDINGS, Statistic
from qpass.rounding.gptq import Gptq, Order, column_order
from qpass.rounding.grid import Grid, Scales, nearest_points
from qpass.rounding.hessian import Curvature
from qpass.rounding.weighted import fit_weighted
from tests.rounding.layers import Layer, inputs, layer, seeded, statistics

G32 = QuantSpec("int4", 32, scale_format="float16")
SPECS = [
    G32,
    QuantSpec("int4", 16, scale_format="float16", symmetric=False),
    QuantSpec("int4"),
    QuantSpec("int8", symmetric=False),
    QuantSpec("int4", "tensor"),
]
EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)


def scales_of(q: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets `[n, g]` in the units of the weight."""
    n = q.shape[0]
    rows = q.row_scales_n.unsqueeze(1)
    scales = torch.ones(n, 1) if q.group_scales_ng is None else q.group_scales_ng.float()
    offsets = 0 * scales if q.group_offsets_ng is None else q.group_offsets_ng.float()
    return scales * rows, offsets * rows


def published(
    weight: Tensor, h: Tensor, order: Sequence[int], spec: QuantSpec, scales: tuple[Tensor, Tensor]
) -> Tensor:
    """The codes of GPTQ as published: updates by the upper factor of the inverse Hessian."""
    n, k = weight.shape
    columns = torch.tensor(order)
    w = weight.float().double()[:, columns]
    inverse = torch.linalg.inv(h[columns][:, columns])
    upper = torch.linalg.cholesky(inverse, upper=True)
    group = columns // (k // scales[0].shape[1])
    codes = torch.empty(n, k, dtype=torch.float64)
    for i in range(k):
        scale, offset = (t[:, group[i]].double() for t in scales)
        low, high = spec.codes.low, spec.codes.high
        q = ((w[:, i] - offset) / scale).round().clamp(low, high)
        codes[:, columns[i]] = q
        lost = (w[:, i] - (q * scale + offset)) / upper[i, i]
        w[:, i + 1 :] -= lost.unsqueeze(1) * upper[i, i + 1 :]
    return codes


@EACH_SPEC
@pytest.mark.parametrize("order", ["memory", "diagonal", "groups"])
def test_static_scales_give_the_codes_of_the_paper(spec: QuantSpec, order: Order):
    one = layer(24, 160, 700, 3)
    q = Gptq(order=order, static=True).round(one.weight, spec, one.stats)
    h = Curvature.of(one.stats, 160).h_kk
    columns = column_order(h.diagonal(), order, spec).tolist()
    assert sorted(columns) == list(range(160))
    differs = q.codes_nk.double() != published(one.weight, h, columns, spec, scales_of(q))
    # codes of 256 levels are near ties more often, and one of them changes the rest of its row
    assert differs.any(1).sum() <= (2 if spec.format == "int8" else 0)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
@pytest.mark.parametrize("order", ["memory", "diagonal", "groups"])
def test_scales_are_found_for_the_updated_weights(spec: QuantSpec, order: Order):
    # an independent loop: the scales of a group when the first of its columns comes
    one = layer(24, 96, 700, 3)
    q = Gptq(order=order, static=False).round(one.weight, spec, one.stats)
    h, grid, length = Curvature.of(one.stats, 96).h_kk, Grid.of(spec), spec.block
    assert isinstance(length, int)
    columns = column_order(h.diagonal(), order, spec)
    w = one.weight.float().double()[:, columns]
    upper = torch.linalg.cholesky(torch.linalg.inv(h[columns][:, columns]), upper=True)
    found: dict[int, Scales] = {}
    for i, column in enumerate(columns.tolist()):
        group = column // length
        mine = columns // length == group
        if group not in found:
            weights = (1 / upper.diagonal().square())[mine].float().unsqueeze(0)
            found[group] = fit_weighted(w[:, mine].float(), weights, grid)
        point = nearest_points(w[:, [i]].float(), grid, found[group]).squeeze(1)
        lost = (w[:, i] - point) / upper[i, i]
        w[:, i + 1 :] -= lost.unsqueeze(1) * upper[i, i + 1 :]
    scales, offsets = scales_of(q)
    for group, expected in found.items():
        assert torch.allclose(scales[:, group], expected.scale_b, rtol=1e-3), group
        assert torch.allclose(offsets[:, group], expected.offset_b, rtol=1e-3, atol=1e-4), group
    static = Gptq(order=order, static=True).round(one.weight, spec, one.stats)
    assert not torch.equal(scales, scales_of(static)[0])


@pytest.mark.parametrize("name", ["gptq", "gptq-descent"])
@EACH_SPEC
def test_better_than_nearest_on_rows_it_never_saw(name: str, spec: QuantSpec):
    one = layer(24, 160, 1600, 5)
    fresh = inputs(160, 2000, 5, draw=1)
    q = ROUNDINGS[name].round(one.weight, spec, one.stats).dequantize(torch.float64)
    plain = ROUNDINGS["weighted"].round(one.weight, spec, one.stats).dequantize(torch.float64)
    assert one.error(q, fresh) < 0.7 * one.error(plain, fresh)


@pytest.mark.parametrize("name", ["gptq", "gptq-descent"])
@pytest.mark.parametrize("tokens", [8, 40, 160, 320])
@pytest.mark.parametrize("correlated", [True, False])
def test_few_samples_do_not_make_it_worse_than_nearest(name: str, tokens: int, correlated: bool):
    k = 160
    one = layer(64, k, tokens, 6, correlated=correlated)
    fresh = inputs(k, 4000, 6, correlated=correlated, draw=1)
    errors = [
        one.error(
            ROUNDINGS[each].round(one.weight, G32, one.stats).dequantize(torch.float64), fresh
        )
        for each in (name, "nearest")
    ]
    assert errors[0] < 1.02 * errors[1]


@pytest.mark.parametrize("name", ["gptq", "gptq-descent"])
def test_columns_without_inputs_are_rounded_to_nearest(name: str):
    one = layer(16, 96, 500, 2)
    dead = torch.tensor([0, 5, 31, 32, 95])
    x = one.x.clone()
    x[:, dead] = 0
    q = ROUNDINGS[name].round(one.weight, G32, statistics(x, 16))
    scales, _ = scales_of(q)
    w = one.weight.float()[:, dead]
    expected = (w / scales[:, dead // 32]).round().clamp(-8, 7)
    assert torch.equal(q.codes_nk[:, dead].float(), expected)


def test_no_samples_at_all_is_nearest_with_its_own_scales():
    one = layer(16, 96, 500, 2)
    q = ROUNDINGS["gptq"].round(one.weight, G32, statistics(0 * one.x, 16))
    plain = ROUNDINGS["weighted"].round(one.weight, G32, statistics(0 * one.x, 16))
    assert torch.equal(q.codes_nk, plain.codes_nk)


def rounded(one: Layer, spec: QuantSpec, name: str) -> list[Tensor]:
    q = ROUNDINGS[name].round(one.weight, spec, one.stats)
    return [q.codes_nk, q.row_scales_n, *([] if q.group_scales_ng is None else [q.group_scales_ng])]


@pytest.mark.parametrize("name", ["gptq", "gptq-descent"])
def test_tiles_and_chunks_only_decide_near_ties(monkeypatch: pytest.MonkeyPatch, name: str):
    one = layer(40, 160, 700, 3)
    for spec in (G32, QuantSpec("int4")):
        whole = rounded(one, spec, name)[0]
        with monkeypatch.context() as patch:
            patch.setattr("qpass.rounding.feedback.TILE", 24)
            patch.setattr("qpass.rounding.descent.TILE", 24)
            patch.setattr("qpass.rounding.rows.CHUNK", 320)
            patch.setattr("qpass.rounding.weighted.CHUNK", 100)
            patch.setattr("qpass.rounding.columns.WIDE_CHUNK", 1500)
            parts = rounded(one, spec, name)[0]
        assert (whole != parts).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["gptq", "gptq-descent"])
def test_threads_do_not_change_a_bit(name: str):
    one = layer(24, 200, 500, 3)
    for spec in (QuantSpec("int4", 50), QuantSpec("int4", "tensor")):
        first = rounded(one, spec, name)
        torch.set_num_threads(2)
        second = rounded(one, spec, name)
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_statistic_of_held_out_samples_is_needed_by_hand():
    one = layer(16, 96, 500, 2)
    given = {Statistic.HESSIAN: one.stats[Statistic.HESSIAN]}
    q = Gptq(shrinkage=0.05).round(one.weight, G32, given).dequantize(torch.float64)
    plain = ROUNDINGS["nearest"].round(one.weight, G32, {}).dequantize(torch.float64)
    assert one.error(q) < 0.5 * one.error(plain)


def test_scaling_inputs_changes_nothing():
    one = layer(16, 96, 500, 2)
    for factor in (1e-12, 1e12):
        scaled = statistics(one.x * factor, 16)
        q = ROUNDINGS["gptq-descent"].round(one.weight, G32, scaled)
        assert torch.equal(q.codes_nk, rounded(one, G32, "gptq-descent")[0])


def test_orders():
    diagonal = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0])
    spec = QuantSpec("int4", 2)
    assert column_order(diagonal, "memory", spec).tolist() == [0, 1, 2, 3, 4, 5]
    assert column_order(diagonal, "diagonal", spec).tolist() == [3, 1, 4, 5, 2, 0]
    assert column_order(diagonal, "groups", spec).tolist() == [3, 2, 1, 0, 4, 5]
    shuffled = torch.rand(64, generator=seeded(1))
    for order in ("diagonal", "groups"):
        assert sorted(column_order(shuffled, order, spec).tolist()) == list(range(64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_the_format_cannot_hold_are_not_taken(symmetric: bool):
    # quiet columns that should make up for many loud ones aim beyond what float16 scales reach
    loud = inputs(16, 900, 2, correlated=False)
    x = torch.cat(
        (*[loud + 0.01 * inputs(16, 900, s, correlated=False) for s in range(3, 19)], 0.001 * loud),
        1,
    )
    w = layer(16, 272, 9, 1).weight
    w = w.sign() * 8000 * torch.rand(16, 272, generator=seeded(1), dtype=torch.float64)
    w[:, 256:] *= 0.01
    spec = QuantSpec("int2", 16, scale_format="float16", symmetric=symmetric)
    one = Layer(w, x)
    for rounding in (Gptq(shrinkage=0.001), ROUNDINGS["gptq-descent"]):
        q = rounding.round(w, spec, one.stats).dequantize(torch.float64)
        plain = ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float64)
        assert q.isfinite().all()
        assert one.error(q) < one.error(plain)
