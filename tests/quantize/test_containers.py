"""Does what holds a weight give it back, and does it multiply by it?"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import FORMATS, SCALES, QuantizedTensor, QuantSpec
from qpass.ops import PackedLinear, PointsLinear, linear_points, linear_real
from qpass.quantize.containers import by_reference, container_bits, hold, release, stored_as
from qpass.rounding import ROUNDINGS
from qpass.targets.tensors import from_tensors, shapes, to_tensors

N, K = 19, 48


def specs() -> list[QuantSpec]:
    """Every format that weights can have, with every format of scales."""
    found: list[QuantSpec] = []
    for fmt, scales in itertools.product(FORMATS, SCALES):
        for block, factor, symmetric in itertools.product(
            (16, "channel"), (False, True), (True, False)
        ):
            try:
                spec = QuantSpec(fmt.name, block, -1, scales.name, factor, symmetric)
            except BadInput:
                continue
            found.append(spec)
    return found


EACH = pytest.mark.parametrize("spec", specs(), ids=str)


def quantized(spec: QuantSpec, magnitude: float = 1.0) -> QuantizedTensor:
    g = torch.Generator().manual_seed(0)
    w = magnitude * torch.randn(N, K, generator=g) * torch.rand(N, 1, generator=g)
    w[3] = 0
    w[4, :16] = 0
    return ROUNDINGS["nearest"].round(w, spec, {})


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    def parts(t: QuantizedTensor) -> list[Tensor | None]:
        scales = [t.group_scales_ng, t.group_offsets_ng]
        return [t.codes_nk, t.row_scales_n, *(s if s is None else s.float() for s in scales)]

    pairs = zip(parts(one), parts(other), strict=True)
    return one.spec == other.spec and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs
    )


@EACH
@pytest.mark.parametrize("magnitude", [1e-20, 0.02, 1e20])
def test_a_weight_comes_back_out_of_its_container(spec: QuantSpec, magnitude: float) -> None:
    tensor = quantized(spec, magnitude)
    assert same(release(hold(tensor), spec), tensor)


@EACH
def test_a_weight_multiplies_in_its_container(spec: QuantSpec) -> None:
    tensor = quantized(spec)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    held = hold(tensor)
    packed = isinstance(held, PackedLinear)
    assert packed is (container_bits(spec) is not None)
    got = linear_real(x, held, None) if packed else linear_points(x, held, None)
    want = x @ tensor.dequantize(torch.float64).T
    # a weight is rounded to float32 once, its parts are multiplied in float64
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


@EACH
def test_a_weight_comes_back_from_its_checkpoint(spec: QuantSpec) -> None:
    tensor = quantized(spec)
    found = to_tensors(tensor)
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.items()} == shapes(spec, N, K)
    assert sum(t.nbytes for t in found.values()) == tensor.bytes
    assert same(from_tensors(spec, K, found), tensor)


def test_kernels_serve_what_integers_hold() -> None:
    mx = QuantSpec("e2m1", 16, scale_format="e8m0")
    int8 = QuantSpec("int8", dynamic=True)
    assert container_bits(QuantSpec("int3", 16, scale_format="float16")) == 4
    assert container_bits(mx) == 8
    assert container_bits(QuantSpec("e4m3")) is None
    assert container_bits(QuantSpec("int4", 16)) is None
    assert not by_reference(mx, None)
    assert not by_reference(mx, int8)
    assert by_reference(QuantSpec("e4m3"), int8)
    assert not by_reference(QuantSpec("int8"), QuantSpec("int8", symmetric=False, dynamic=True))
    assert not by_reference(QuantSpec("int8"), QuantSpec("int8", "tensor", scale=0.1))
    assert by_reference(QuantSpec("int8"), QuantSpec("e4m3", "tensor", scale=0.1))
    assert by_reference(QuantSpec("int8"), QuantSpec("int8", 16, dynamic=True))


def test_powers_of_two_far_below_the_row_are_zeros_and_stay_so() -> None:
    spec = QuantSpec("e2m1", 16, scale_format="e8m0")
    w = torch.randn(4, K, generator=torch.Generator().manual_seed(0))
    w[1, :16] *= 2.0**-30
    w[2, :16] *= 2.0**-60
    tensor = ROUNDINGS["nearest"].round(w, spec, {})
    back = release(hold(tensor), spec)
    want = tensor.dequantize(torch.float32)
    got = back.dequantize(torch.float32)
    assert torch.equal(got[:2], want[:2])
    assert torch.equal(got[2, :16], torch.zeros(16))
    assert torch.equal(got[2:, 16:], want[2:, 16:])
    assert same(release(hold(back), spec), back)


def test_weights_that_are_stored_alike_have_one_spec() -> None:
    asymmetric = QuantSpec("int4", K, scale_format="float16", symmetric=False)
    assert stored_as(asymmetric, K).block == "channel"
    assert stored_as(asymmetric, 2 * K) == asymmetric
    assert stored_as(QuantSpec("int8", "tensor", 0), K) == QuantSpec("int8")
    nv = QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True)
    assert stored_as(nv, 16) == nv


def test_a_table_is_nobody_elses() -> None:
    one, other = (hold(quantized(QuantSpec("e4m3"))) for _ in range(2))
    assert isinstance(one, PointsLinear)
    assert isinstance(other, PointsLinear)
    one.points.zero_()
    assert other.points.any()
