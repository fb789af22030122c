"""Do products of 4-bit floats in blocks mean what dynamic formats and plain products say?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ops import BlocksLinear, fake_quantize, linear_blocks, quantize_blocks
from qpass.ops.library import specification
from qpass.quantize.containers import hold, in_blocks, release
from qpass.rounding import ROUNDINGS

# as in MXFP4 and NVFP4, and other blocks
KINDS = ((32, "e8m0"), (16, "e4m3"), (8, "e8m0"), (2, "e4m3"))
EACH = pytest.mark.parametrize("kind", KINDS, ids=str)


def spec(kind: tuple[int, str], *, dynamic: bool = True) -> QuantSpec:
    block, scales = kind
    factor = scales == "e4m3"
    return QuantSpec("e2m1", block, scale_format=scales, tensor_scale=factor, dynamic=dynamic)


def rows(*lead: int, k: int = 96) -> Tensor:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*lead, k, generator=g)
    x[..., 5] *= 30
    return x * 10.0 ** torch.linspace(-3, 3, x[..., 0].numel()).reshape(*lead, 1)


def numbers(made: tuple[Tensor, Tensor, Tensor], scale_format: str) -> Tensor:
    """What codes and scales of rows stand for."""
    codes, scales, factors = made
    lead = codes.shape[:-1]
    one = BlocksLinear(
        codes.reshape(-1, codes.shape[-1]), scales.reshape(-1, scales.shape[-1]),
        factors.reshape(-1), scale_format,
    )  # fmt: skip
    return one.dequantize(torch.float32).reshape(*lead, -1)


@EACH
def test_rows_are_those_of_the_dynamic_format(kind: tuple[int, str]) -> None:
    x = rows(3, 5)
    x[1, 2] = 0
    x[2, 1, 7] = torch.nan
    x[2, 2, 8] = -torch.inf
    made = quantize_blocks(x, *kind)
    block, scales = kind
    assert [tuple(t.shape) for t in made] == [(3, 5, 48), (3, 5, 96 // block), (3, 5, 1)]
    want = fake_quantize(x, spec(kind))
    got = numbers(made, scales)
    # a factor over the row is multiplied last
    assert torch.allclose(got, want, rtol=1e-6, atol=0, equal_nan=True)
    assert made[0][2, 1].count_nonzero() == made[0][1, 2].count_nonzero() == 0
    if scales == "e8m0":
        assert torch.equal(got[0], want[0])
        assert made[2][0].eq(1).all()


@EACH
def test_a_rotation_comes_first(kind: tuple[int, str]) -> None:
    x = rows(4)
    signs = torch.randint(0, 2, (96,)).float() * 2 - 1
    factor = torch.linalg.qr(torch.randn(3, 3)).Q
    made = quantize_blocks(x.bfloat16(), *kind, signs, factor, 32)
    want = fake_quantize(x.bfloat16(), spec(kind), signs, factor, 32)
    assert torch.allclose(numbers(made, kind[1]), want, rtol=1e-6, atol=0)
    with pytest.raises(BadInput, match="both"):
        quantize_blocks(x, *kind, signs)


@EACH
def test_a_product_is_that_of_its_numbers(kind: tuple[int, str]) -> None:
    x, weight = rows(2, 3), rows(7)
    static = spec(kind, dynamic=False)
    tensor = ROUNDINGS["nearest"].round(weight.double(), static, {})
    held = hold(tensor, blocks=True)
    assert isinstance(held, BlocksLinear)
    assert held.weight.nbytes == weight.numel() // 2
    assert torch.equal(held.dequantize(torch.float32), tensor.dequantize(torch.float32))
    again = release(held, static)
    assert torch.equal(again.codes_nk, tensor.codes_nk)
    made, bias = quantize_blocks(x, *kind), torch.randn(7)
    for dtype, close in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        got = linear_blocks(*made, held, bias, dtype)
        y = numbers(made, kind[1]).double() @ tensor.dequantize(torch.float64).T + bias.double()
        assert got.dtype is dtype
        assert ((got.double() - y).abs() <= close * y.abs().amax(-1, keepdim=True)).all()


def test_which_specs_hardware_multiplies() -> None:
    for kind, served in zip(KINDS, (True, True, False, False), strict=True):
        weight, activation = spec(kind, dynamic=False), spec(kind)
        assert in_blocks(weight, activation) is served
        assert not in_blocks(weight, None)
        assert not in_blocks(weight, spec(KINDS[0 if kind is KINDS[1] else 1]))
        assert not in_blocks(QuantSpec("int4", 32, scale_format="e8m0"), activation)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = rows(3)
    with pytest.raises(BadInput, match="blocks of 36"):
        quantize_blocks(x, 36, "e8m0")
    with pytest.raises(BadInput, match="even"):
        quantize_blocks(x, 3, "e8m0")
    with pytest.raises(BadInput, match="float16"):
        quantize_blocks(x, 32, "float16")
    codes, scales, factors = quantize_blocks(x, 32, "e8m0")
    held = BlocksLinear(codes, scales, factors.reshape(-1), "e8m0")
    for wrong in (
        (codes[:, :16], scales, factors),
        (codes, scales[:, :2], factors),
        (codes, scales, factors[:2]),
        (codes.view(torch.int8), scales, factors),
    ):
        with pytest.raises(BadInput, match=r"expected|divide"):
            linear_blocks(*wrong, held, None, torch.float32)
    with pytest.raises(BadInput, match="bias"):
        linear_blocks(codes, scales, factors, held, torch.zeros(2), torch.float32)


@EACH
@pytest.mark.parametrize("lead", [(), (0,), (2, 1)], ids=str)
def test_fake_results_have_the_shapes_of_real_ones(
    kind: tuple[int, str], lead: tuple[int, ...]
) -> None:
    x = torch.randn(*lead, 64)
    made = specification("quantize_blocks")(x, *kind)
    there = quantize_blocks(x.to("meta"), *kind)
    assert [(t.shape, t.dtype) for t in made] == [(t.shape, t.dtype) for t in there]
    codes, scales, factors = quantize_blocks(torch.randn(5, 64), *kind)
    held = BlocksLinear(codes, scales, factors.reshape(-1), kind[1])
    got = linear_blocks(*made, held, None, torch.float16)
    parts = (t.to("meta") for t in (codes, scales, factors.reshape(-1)))
    fake = linear_blocks(*there, BlocksLinear(*parts, kind[1]), None, torch.float16)
    assert (got.shape, got.dtype) == (fake.shape, fake.dtype) == ((*lead, 5), torch.float16)
