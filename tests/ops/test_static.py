"""Do activations of integers that are not plain rows mean what their specs say?"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantSpec, spanning
from qpass.ops import as_integers, as_read, fake_quantize, hadamard, quantize_rows

STATIC = [
    QuantSpec(name, "tensor", symmetric=symmetric)
    for name, symmetric in itertools.product(("int2", "int4", "int8"), (True, False))
]
ROWS = [
    QuantSpec(name, symmetric=symmetric, dynamic=True, clip=clip)
    for name, symmetric, clip in itertools.product(
        ("int2", "int4", "int8"), (True, False), (1.0, 0.75)
    )
]


def rows(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, 48, generator=g) * 10.0 ** torch.linspace(-1, 1, 15).reshape(3, 5, 1)


def measured(spec: QuantSpec, x: Tensor) -> QuantSpec:
    return spanning(spec, float(x.min()), float(x.max())) if spec.static else spec


def by_hand(x: Tensor, spec: QuantSpec) -> Tensor:
    """The same written independently, in float64."""
    x, levels = x.double(), 2**spec.codes.bits - 1
    if spec.static:
        assert spec.scale is not None
        codes = ((x / spec.scale).round() + spec.zero).clamp(-(levels // 2) - 1, levels // 2)
        return (codes - spec.zero) * spec.scale
    if spec.symmetric:
        scale = spec.clip * x.abs().amax(-1, keepdim=True) / (levels // 2)
        return (x / scale).round().clamp(spec.codes.low, levels // 2) * scale
    low, high = (spec.clip * end for end in x.aminmax(dim=-1, keepdim=True))
    steps = levels if spec.codes.low == 0 else levels - 1  # int8 has no -128
    scale = (high - low) / steps
    return ((x - low) / scale).round().clamp(0, steps) * scale + low


@pytest.mark.parametrize("spec", [*STATIC, *ROWS], ids=str)
def test_codes_and_floats_are_what_is_written(spec: QuantSpec) -> None:
    x = rows()
    spec = measured(spec, x)
    want = by_hand(x, spec)
    # float32 may decide a tie the other way
    for got in (fake_quantize(x, spec), as_read(x, spec)):
        assert float(((got - want).abs() > 1e-4 * want.abs().max()).float().mean()) < 1e-3
    codes, scales, offsets = as_integers(x, spec)
    assert codes.dtype is torch.int8
    assert (offsets is None) == (spec.zero == 0 if spec.static else spec.symmetric)
    values = codes * scales if offsets is None else codes * scales + offsets
    assert torch.allclose(values, fake_quantize(x, spec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [*STATIC, *ROWS], ids=str)
def test_rotations_come_first_and_bad_rows_are_nan(spec: QuantSpec) -> None:
    signs, factor = torch.ones(48), torch.linalg.qr(torch.randn(3, 3)).Q
    x = rows()
    spec = measured(spec, x)
    turned = hadamard(x, signs, factor, 16)
    for got, want in zip(
        as_integers(x, spec, signs, factor, 16), as_integers(turned, spec), strict=True
    ):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            # kernels turn with sums in another order, which may turn a tie
            apart = (got.float() - want.float()).abs() > 1e-5 * want.abs().max()
            assert float(apart.float().mean()) < 0.01
    x[0, 1, 3], x[1, 2, 4] = torch.nan, -torch.inf
    for got in (as_read(x, spec), fake_quantize(x, spec)):
        bad = got.isnan()
        assert bad[0, 1].all()
        assert bad[1, 2].all()
        assert int(bad.sum()) == 2 * 48
    zeros = torch.zeros(2, 48)
    assert torch.equal(as_read(zeros, spec), zeros)


def test_static_codes_use_the_lowest_one_too() -> None:
    spec = QuantSpec("int8", "tensor", scale=1.0)
    codes, _, _ = as_integers(torch.tensor([[-300.0, -127.6, 126.5, 300.0]]), spec)
    assert codes.tolist() == [[-128, -128, 126, 127]]


def test_no_clip_is_the_plain_operator() -> None:
    plain = quantize_rows(rows(), 4)
    whole = torch.ops.qpass.quantize_rows.clipped(rows(), -8, 7, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)]
)
def test_a_span_has_zero_as_a_code_and_reaches_both_ends(low: float, high: float) -> None:
    spec = spanning(QuantSpec("int8", "tensor", symmetric=False), low, high)
    assert spec.scale is not None
    first, last = (((end - spec.zero) * spec.scale) for end in spec.whole_range)
    assert first <= min(low, 0) + spec.scale
    assert last >= max(high, 0) - spec.scale
    assert float(as_read(torch.zeros(1, 4), spec).abs().max()) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"clip": 0.0}, "clip = 0.0"),
        ({"clip": 1.5}, "clip = 1.5"),
        ({"clip": True}, "clip = True"),
        ({"clip": 0.9, "dynamic": False}, "clip = 0.9"),
        ({"scale": 0.5}, "scale = 0.5"),
        ({"scale": -1.0, "dynamic": False, "block": "tensor"}, "scale = -1.0"),
        ({"zero": 3}, "zero = 3"),
        ({"scale": 1.0, "zero": 3, "dynamic": False, "block": "tensor"}, "zero = 3"),
        (
            {"scale": 1.0, "zero": 200, "dynamic": False, "block": "tensor", "symmetric": False},
            "zero = 200",
        ),
    ],
    ids=str,
)
def test_specs_that_mean_nothing_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        QuantSpec.read({"format": "int8", "dynamic": True, **arguments})


def test_a_static_spec_without_a_scale_is_no_operator() -> None:
    with pytest.raises(BadInput, match="static scale is missing"):
        fake_quantize(rows(), STATIC[0])
