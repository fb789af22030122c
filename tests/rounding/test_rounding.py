"""Every registered rounding: valid codes, deterministic, never worse than the plain scale."""

import math

import pytest
import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS, Rounding, Stats
from tests.rounding.layers import statistics

EACH = pytest.mark.parametrize("rounding", list(ROUNDINGS), ids=lambda r: r.name)
SPECS = [
    QuantSpec("int4", 32, scale_format="float16", symmetric=False),
    QuantSpec("int4", 64, scale_format="float16"),
    QuantSpec("int4", 16),
    QuantSpec("int4", "channel"),
    QuantSpec("int4", "channel", symmetric=False),
    QuantSpec("int4", "tensor"),
    QuantSpec("int8", "channel"),
    QuantSpec("int8", "tensor", symmetric=False),
    QuantSpec("int8", 32, scale_format="float16", symmetric=False),
    QuantSpec("int8", 32, scale_format="float16"),
    QuantSpec("int3", 64, scale_format="float16"),
    QuantSpec("int2", 32, scale_format="float16", symmetric=False),
    QuantSpec("int2", 64, scale_format="float16"),
    QuantSpec("int4", 32, scale_format="bfloat16"),
    QuantSpec("e2m1", "channel"),
    QuantSpec("e2m1", 32, scale_format="e8m0"),
    QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True),
    QuantSpec("e4m3", "channel"),
    QuantSpec("e4m3", 32, scale_format="e8m0"),
    QuantSpec("int8", "tensor", scale_format="e8m0"),
]
EACH_SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)
# sums of squares are compared in float64, but were minimised in float32
SUM_NOISE = 1e-5


def stats(k: int, n: int = 4) -> Stats:
    x = torch.randn(3 * k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return statistics(x, n)


def random_weight(n: int, k: int, seed: int, *, tails: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, dtype=torch.float64, generator=generator) + 0.3
    if tails:
        w = w * torch.randn(n, k, dtype=torch.float64, generator=generator).exp()
    return w * torch.rand(n, 1, dtype=torch.float64, generator=generator)


def plain_error(w: Tensor, spec: QuantSpec) -> Tensor:
    """The squared error of each row with scales from the plain ends, written independently."""
    n, k = w.shape
    blocks = w.reshape(1, 1, n * k) if spec.block == "tensor" else w.reshape(n, spec.groups(k), -1)
    low, high = spec.codes.low, spec.codes.high
    factor = w.abs().max() / (high * spec.scales.top) if spec.tensor_scale else 1.0
    blocks = blocks / factor
    stored = lambda x: x.to(spec.scale_dtype).double()  # noqa: E731
    if spec.scale_format == "e8m0":
        # what the specification of the MX formats says
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = 2.0 ** (largest.log2().floor() - math.floor(math.log2(high)))
        offset = torch.zeros_like(scale)
    elif spec.symmetric:
        scale = stored(blocks.abs().amax(-1, keepdim=True) / high)
        offset = torch.zeros_like(scale)
    else:
        ends = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        scale = stored((ends[1] - ends[0]) / (high - low))
        offset = stored(ends[0] - scale * low)
    points = spec.codes.decode(spec.codes.encode((blocks - offset) / scale)).double()
    return ((points * scale + offset - blocks) ** 2).sum((1, 2)) * factor**2


@EACH
@EACH_SPEC
def test_codes_are_valid_and_the_same_each_time(rounding: Rounding, spec: QuantSpec):
    w = random_weight(5, 64, 1, tails=True)
    q = rounding.round(w, spec, stats(64, 5))
    assert q.shape == (5, 64)
    assert torch.isin(q.codes_nk, spec.codes.codes()).all()
    again = rounding.round(w, spec, stats(64, 5))
    assert torch.equal(q.codes_nk, again.codes_nk)
    assert torch.equal(q.row_scales_n, again.row_scales_n)


@EACH_SPEC
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_is_never_worse_than_plain_scales(spec: QuantSpec, tails: bool, seed: int):
    w = random_weight(11, 576, seed, tails=tails)
    error = ((ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float64) - w) ** 2).sum(1)
    if spec.block == "tensor":
        error = error.sum().reshape(1)
    assert (error <= plain_error(w, spec) * (1 + SUM_NOISE)).all()


def test_clipping_pays_where_rows_are_long():
    w = random_weight(8, 1536, 3)
    for spec, gain in ((QuantSpec("int4"), 0.8), (QuantSpec("int4", symmetric=False), 0.9)):
        error = ((ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float64) - w) ** 2).sum()
        assert error < gain * plain_error(w, spec).sum()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-6, 1.0, 1e4, 1e6, 1e30])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_magnitude_loses_precision(spec: QuantSpec, magnitude: float):
    w = random_weight(6, 64, 5)
    if spec.scale_format == "e8m0":
        # powers of two follow no other factor
        magnitude = 2.0 ** round(math.log2(magnitude))
    error = [
        torch.linalg.vector_norm(
            ROUNDINGS["nearest"].round(v, spec, {}).dequantize(torch.float64) - v
        )
        for v in (w, w * magnitude)
    ]
    assert error[1].item() / magnitude == pytest.approx(error[0].item(), rel=0.02)


def test_rows_of_different_magnitude_each_keep_theirs():
    spec = SPECS[0]
    w = random_weight(6, 64, 5) * 10.0 ** torch.tensor([[-20], [-12], [-5], [0], [4], [12]])
    q = ROUNDINGS["nearest"].round(w, spec, {})
    error = (q.dequantize(torch.float64) - w).norm(dim=1) / w.norm(dim=1)
    assert error.max() < 0.15
    assert torch.equal(q.row_scales_n, 2 ** q.row_scales_n.log2().round())
    assert q.row_scales_n[3] == 1
    scales = q.group_scales_ng
    assert scales is not None
    assert scales.float().min() >= 2.0**-14


def test_offsets_far_above_the_spread_do_not_cut_the_block_off():
    w = 1000.3 + 1e-3 * random_weight(4, 64, 2)
    q = ROUNDINGS["nearest"].round(w, SPECS[0], {})
    error = (q.dequantize(torch.float64) - w).abs()
    assert q.group_scales_ng is not None
    assert (q.group_scales_ng >= 0).all()
    # the stored offset is up to half a unit away; the fifteen levels cover what is left
    assert error.max() < 0.02


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_and_empty_weights(spec: QuantSpec):
    nearest = ROUNDINGS["nearest"]
    w = random_weight(3, 64, 1)
    w[1] = 0
    back = nearest.round(w, spec, {}).dequantize(torch.float32)
    if spec.symmetric or spec.block != "tensor":
        assert torch.equal(back[1], torch.zeros(64))
    assert torch.equal(nearest.round(w * 0, spec, {}).dequantize(torch.float32), torch.zeros(3, 64))
    assert nearest.round(w[:0], spec, {}).shape == (0, 64)
    assert nearest.round(w[:, :0], spec, {}).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_dtype_is_read_and_none_is_written(dtype: torch.dtype):
    w = random_weight(5, 64, 4).to(dtype).requires_grad_()
    before = w.detach().clone()
    q = ROUNDINGS["nearest"].round(w, SPECS[0], {})
    assert torch.equal(w.detach(), before)
    wide = ROUNDINGS["nearest"].round(before.double(), SPECS[0], {})
    assert torch.equal(q.codes_nk, wide.codes_nk)


def test_non_contiguous_weights_give_the_same_codes():
    w = random_weight(64, 96, 4)
    a = ROUNDINGS["nearest"].round(w.t(), SPECS[0], {})
    b = ROUNDINGS["nearest"].round(w.t().contiguous(), SPECS[0], {})
    assert torch.equal(a.codes_nk, b.codes_nk)


def test_chunks_do_not_change_the_error(monkeypatch: pytest.MonkeyPatch):
    w = random_weight(9, 192, 4, tails=True)

    def errors() -> Tensor:
        found = [
            ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float64) for spec in SPECS
        ]
        return (torch.stack(found) - w).square().sum((1, 2))

    whole = errors()
    monkeypatch.setattr("qpass.rounding.rows.CHUNK", 200)
    monkeypatch.setattr("qpass.rounding.grid.PART", 50)
    # other orders of summation may decide near-ties differently
    assert torch.allclose(errors(), whole, rtol=1e-3)


def test_threads_do_not_change_a_bit():
    w = random_weight(10, 8192, 4, tails=True)
    for spec in (QuantSpec("int4", "tensor"), QuantSpec("int4"), SPECS[0]):
        one = ROUNDINGS["nearest"].round(w, spec, {})
        torch.set_num_threads(2)
        two = ROUNDINGS["nearest"].round(w, spec, {})
        torch.set_num_threads(1)
        assert torch.equal(one.codes_nk, two.codes_nk)
        assert torch.equal(one.row_scales_n, two.row_scales_n)


@EACH
def test_what_cannot_be_rounded_is_refused(rounding: Rounding):
    w = random_weight(4, 64, 1)
    for bad in (float("nan"), float("inf"), -float("inf"), 1e300):
        broken = w.clone()
        broken[2, 3] = bad
        with pytest.raises(BadInput, match="NaN"):
            rounding.round(broken, SPECS[0], stats(64))
    with pytest.raises(BadInput, match="multiple of the block"):
        rounding.round(w[:, :48], SPECS[0], stats(48))
    with pytest.raises(BadInput, match="axes"):
        rounding.round(w[0], SPECS[0], stats(64))
    with pytest.raises(BadInput, match="dtype"):
        rounding.round(w.to(torch.int8), SPECS[0], stats(64))
    with pytest.raises(BadInput, match="dynamic"):
        rounding.round(w, QuantSpec("int8", dynamic=True), stats(64))


@EACH
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (1, 1), (1, 64)], ids=str)
def test_the_smallest_weights(rounding: Rounding, shape: tuple[int, int]):
    n, k = shape
    w = random_weight(n, k, 1).bfloat16().requires_grad_()
    for spec in SPECS:
        if spec.supports(shape) is None:
            q = rounding.round(w, spec, statistics(torch.ones(7, k, dtype=torch.float64), n))
            assert q.shape == shape
            assert n * k == 0 or q.dequantize(torch.float32).isfinite().all()
    zero = torch.zeros(4, 64)
    q = rounding.round(zero, SPECS[0], stats(64, 4))
    assert torch.equal(q.dequantize(torch.float32), zero)
