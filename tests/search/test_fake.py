"""Is what is trained on what is stored, and does its gradient point to smaller errors?"""

import pytest
import torch

from qpass.formats import FORMATS, Integers, QuantSpec
from qpass.ops import quantize_rows
from qpass.rounding import ROUNDINGS
from qpass.search.fake import best_clip, fake


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIGNED = [f for f in FORMATS if f.low < 0 and f.dim == 1]


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_read_as_they_are_stored(bits: int) -> None:
    x = values(5, 48)
    codes, scales = quantize_rows(x, bits)
    spec = QuantSpec(f"int{bits}", dynamic=True)
    torch.testing.assert_close(fake(x, spec), codes.float() * scales, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", SIGNED, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("block", "symmetric"), [("channel", True), (16, True), (16, False), ("tensor", True)]
)
def test_weights_are_nearly_as_good_as_rounded_ones(form, block, symmetric: bool) -> None:
    if not symmetric and not isinstance(form, Integers):
        pytest.skip("only integers count from zero")
    spec = QuantSpec(form.name, block, symmetric=symmetric)
    w = values(6, 48) + (0 if symmetric else 0.5)
    got = fake(w, spec, best_clip(w, spec))
    assert got.shape == w.shape
    stored = ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float32)
    error, least = ((x - w).square().sum() for x in (got, stored))
    assert error <= 1.6 * least


def test_zeros_and_single_points() -> None:
    for spec in (QuantSpec("int4"), QuantSpec("int4", symmetric=False)):
        assert torch.equal(fake(torch.zeros(3, 8), spec), torch.zeros(3, 8))


def test_a_smaller_extreme_is_a_smaller_error() -> None:
    # one outlier makes the steps of a row: the gradient shrinks it
    x = values(64, 32) * 0.1
    x[:, 0] = 4
    x.requires_grad_()
    loss = (fake(x, QuantSpec("int4")) - x.detach()).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient[:, 0] > 0).float().mean() > 0.9


def test_what_is_inside_passes_its_gradient() -> None:
    x = values(4, 16).requires_grad_()
    largest = x.detach().abs().argmax(-1)
    (gradient,) = torch.autograd.grad(fake(x, QuantSpec("int8")).sum(), x)
    rest = torch.ones_like(x).bool()
    rest[torch.arange(4), largest] = False
    assert torch.equal(gradient[rest], torch.ones_like(gradient[rest]))
