"""Is what is trained on what is stored, and does its gradient point to smaller errors?"""

import itertools

import pytest
import torch

from qpass.formats import FORMATS, Integers, QuantSpec
from qpass.formats.scales import SCALES
from qpass.ops import as_read
from qpass.rounding import ROUNDINGS
from qpass.search.fake import best_clip, fake


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIGNED = [f for f in FORMATS if f.low < 0 and f.dim == 1]


DYNAMIC = [
    QuantSpec("int4", dynamic=True),
    QuantSpec("int8", dynamic=True),
    QuantSpec("int4", 16, scale_format="float16", dynamic=True),
    QuantSpec("int8", symmetric=False, dynamic=True),
    QuantSpec("e2m1", 16, scale_format="e8m0", dynamic=True),
    QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True, dynamic=True),
    QuantSpec("e4m3", dynamic=True),
    QuantSpec("int4", dynamic=True, clip=0.8),
    QuantSpec("int8", "tensor", scale=0.011),
    QuantSpec("int8", "tensor", symmetric=False, scale=0.02, zero=-30),
    QuantSpec("e4m3", "tensor", scale=0.004),
]


@pytest.mark.parametrize("spec", DYNAMIC, ids=str)
def test_activations_are_what_products_read(spec: QuantSpec) -> None:
    x = values(2, 5, 48)
    assert torch.equal(fake(x, spec), as_read(x, spec))
    assert torch.equal(fake(x.clone().requires_grad_(), spec), as_read(x, spec))


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("int4", dynamic=True, clip=0.4), QuantSpec("int8", "tensor", scale=0.006)],
    ids=str,
)
def test_what_is_clipped_passes_no_gradient_of_its_own(spec: QuantSpec) -> None:
    x = values(4, 48).requires_grad_()
    size, largest = x.detach().abs(), x.detach().abs().argmax(-1, keepdim=True)
    ends = size.amax(-1, keepdim=True) * spec.clip if spec.scale is None else 128 * spec.scale
    (gradient,) = torch.autograd.grad(fake(x, spec).sum(), x)
    # a code may be one step beyond the end
    clipped, inside = size > ends * 1.2, size < ends * 0.9
    # the end of a dynamic grid moves with the largest
    clipped.scatter_(-1, largest, value=False)
    inside.scatter_(-1, largest, value=False)
    assert clipped.any()
    assert (gradient[clipped] == 0).all()
    assert (gradient[inside] == 1).all()


def weight_specs() -> list[QuantSpec]:
    """Every format with blocks and scales that go with it."""
    found: list[QuantSpec] = []
    for form in SIGNED:
        for block, scales, symmetric in itertools.product(
            ("channel", "tensor", 16), SCALES, (True, False)
        ):
            if scales.needs_factor and block != 16:
                continue
            if not symmetric and not (scales.signed and isinstance(form, Integers)):
                continue
            factor = scales.needs_factor
            found.append(
                QuantSpec(
                    form.name,
                    block,
                    scale_format=scales.name,
                    tensor_scale=factor,
                    symmetric=symmetric,
                )
            )
    return found


@pytest.mark.parametrize("spec", weight_specs(), ids=str)
def test_weights_are_on_grids_that_are_stored(spec: QuantSpec) -> None:
    """What can be stored loses nothing when it is rounded again."""
    w = 0.01 * values(6, 48) + (0 if spec.symmetric else 0.005)
    got = fake(w, spec, best_clip(w, spec))
    assert got.shape == w.shape
    error = (got - w).square().sum()
    nearest = ROUNDINGS["nearest"]
    stored = nearest.round(w, spec, {}).dequantize(torch.float32)
    assert error <= 1.6 * (stored - w).square().sum()
    if not spec.symmetric:
        # which grid with an offset something was made on is not always found
        return
    again = nearest.round(got, spec, {}).dequantize(torch.float32)
    torch.testing.assert_close(again, got, rtol=1e-6, atol=1e-3 * float(error.sqrt()) / 48)


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
