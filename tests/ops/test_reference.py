"""Do the operators without kernels mean what they say: dynamic formats, and weights in tables?"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import FORMATS, SCALES, QuantSpec
from qpass.ops import PointsLinear, fake_quantize, hadamard, linear_points, quantize_rows
from qpass.quantize.containers import hold
from qpass.rounding import ROUNDINGS


def dynamic() -> list[QuantSpec]:
    """Every format with every format of scales, per token and in blocks, as far as they go."""
    found: list[QuantSpec] = []
    for fmt, scales in itertools.product(FORMATS, SCALES):
        for block, factor, symmetric in itertools.product(
            (16, "channel"), (False, True), (True, False)
        ):
            try:
                spec = QuantSpec(
                    fmt.name,
                    block,
                    scale_format=scales.name,
                    tensor_scale=factor,
                    symmetric=symmetric,
                    dynamic=True,
                )
            except BadInput:
                continue
            found.append(spec)
    return found


EACH = pytest.mark.parametrize("spec", dynamic(), ids=str)


def rows(seed: int = 0) -> Tensor:
    """Rows of very different magnitude, with an outlier each."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 48, generator=g)
    x[..., 7] *= 20
    return x * 10.0 ** torch.linspace(-3, 3, 15).reshape(3, 5, 1)


def plain(x: Tensor, spec: QuantSpec) -> Tensor:
    """The largest magnitude of a block on the largest point, written independently, in float64."""
    codes, scales = spec.codes, spec.scales
    length = spec.block if isinstance(spec.block, int) else x.shape[-1]
    blocks = x.double().reshape(-1, x.shape[-1] // length, length)
    factor = torch.ones(len(blocks), 1, 1, dtype=torch.float64)
    if spec.tensor_scale:
        factor = blocks.abs().amax((1, 2), keepdim=True) / (codes.high * scales.top)
    blocks = blocks / factor
    if spec.symmetric:
        offset = torch.zeros_like(factor)
        scale = blocks.abs().amax(-1, keepdim=True) / codes.high
    else:
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        scale = (high - low) / (codes.high - codes.low)
    if spec.scale_format == "e8m0":
        # what the specification of the MX formats says
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = 2.0 ** (largest.log2().floor() - math.floor(math.log2(codes.high)))
    scale = scale.to(spec.scale_dtype).double()
    if not spec.symmetric:
        offset = (low - scale * codes.low).to(spec.scale_dtype).double()
    points = codes.decode(codes.encode((blocks - offset) / scale)).double()
    return ((points * scale + offset) * factor).reshape(x.shape)


@EACH
def test_rows_are_never_further_than_the_plain_scale_takes_them(spec: QuantSpec) -> None:
    x = rows()
    got = fake_quantize(x, spec)
    assert got.dtype is torch.float32
    error, limit = ((y.double() - x.double()).square().sum(-1) for y in (got, plain(x, spec)))
    # float32 may decide a tie the other way
    assert (error <= limit * (1 + 1e-4) + 1e-12 * x.square().sum(-1)).all()


@EACH
def test_every_row_stands_alone(spec: QuantSpec) -> None:
    x = rows()
    whole = fake_quantize(x, spec)
    assert torch.equal(fake_quantize(x[1:2, 3:], spec), whole[1:2, 3:])
    x[0, 0, 5] = torch.nan
    x[1, 1, 40] = torch.inf
    x[2, 2] = 0
    got = fake_quantize(x, spec)
    bad = torch.zeros(3, 5, dtype=torch.bool)
    bad[0, 0] = bad[1, 1] = True
    assert got[bad].isnan().all()
    assert torch.equal(got[2, 2], torch.zeros(48))
    bad[2, 2] = True
    assert torch.equal(got[~bad], whole[~bad])


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_integers_per_token_are_those_of_the_kernels(bits: int) -> None:
    codes, scales = quantize_rows(rows(), bits)
    got = fake_quantize(rows(), QuantSpec(f"int{bits}", dynamic=True))
    assert torch.allclose(got, codes * scales, rtol=1e-6)


def test_a_rotation_comes_first_and_types_do_not_matter() -> None:
    spec = QuantSpec("e2m1", 16, scale_format="e8m0", dynamic=True)
    signs, factor = torch.ones(48), torch.linalg.qr(torch.randn(3, 3)).Q
    x = rows().bfloat16()
    want = fake_quantize(hadamard(x.float(), signs, factor, 16), spec)
    assert torch.equal(fake_quantize(x, spec, signs, factor, 16), want)
    assert fake_quantize(x.double(), spec).dtype is torch.float64
    assert torch.equal(fake_quantize(x.double(), spec).float(), fake_quantize(x, spec))
    assert fake_quantize(x[:0], spec).shape == (0, 5, 48)


def test_known_blocks() -> None:
    mx = QuantSpec("e2m1", 4, scale_format="e8m0", dynamic=True)
    x = torch.tensor([[6.0, 1.2, -0.3, 0.0, 7.0, 0.1, 0.1, 0.1, 12.0, 2.0, -1.0, 3.0]])
    want = [[6, 1, -0.5, 0, 6, 0, 0, 0, 12, 2, -1, 3]]
    assert fake_quantize(x, mx).tolist() == want
    # the largest entry of the first block on 4: of 6, 30 would be no point
    nv = QuantSpec("e2m1", 4, scale_format="e4m3", tensor_scale=True, dynamic=True)
    x = torch.tensor([[10.0, 30.0, 40.0, 20.0, 280.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(fake_quantize(x, nv), x, rtol=1e-5)


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(BadInput, match="48 is not a multiple of the block 32"):
        fake_quantize(rows(), QuantSpec("int4", 32, dynamic=True))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("e4m3"),
        QuantSpec("e2m1", 16),
        QuantSpec("int4", 16, symmetric=False),
        QuantSpec("int8", 12, scale_format="bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_table_of_points_multiplies_as_its_weight(spec: QuantSpec, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tensor = ROUNDINGS["nearest"].round(torch.randn(7, 48, generator=g), spec, {})
    held = hold(tensor)
    assert isinstance(held, PointsLinear)
    x, bias = rows().to(dtype), torch.randn(7, generator=g)
    want = x.double() @ tensor.dequantize(torch.float64).T + bias.double()
    got = linear_points(x, held, bias)
    assert got.dtype is dtype
    # the weight that is compared with was rounded to float32
    limit = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert (got.double() - want).abs().max() <= limit * want.abs().max()
    assert torch.equal(held.dequantize(torch.float32), tensor.dequantize(torch.float32))


def test_parts_that_do_not_fit_are_refused() -> None:
    x, codes, rows_n = torch.ones(2, 8), torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3)
    table = torch.zeros(256)
    for held, bias, why in (
        (PointsLinear(codes[:, :4], table, rows_n, None, None), None, "8 features"),
        (PointsLinear(codes, table[:16], rows_n, None, None), None, "points"),
        (PointsLinear(codes, table, rows_n[:1], None, None), None, "row_scales"),
        (PointsLinear(codes, table, rows_n, torch.ones(3, 3), None), None, "columns"),
        (PointsLinear(codes, table, rows_n, torch.ones(2, 2), None), None, "group_scales"),
        (PointsLinear(codes, table, rows_n, None, None), torch.ones(2), "bias"),
    ):
        with pytest.raises(BadInput, match=why):
            linear_points(x, held, bias)
