"""Weights that already lie on a grid keep their codes: nothing is lost by rounding them again."""

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS

Q4_1 = QuantSpec("int4", 32, scale_format="float16", symmetric=False)
Q4_0 = QuantSpec("int4", 32, scale_format="float16")
Q8_0 = QuantSpec("int8", 32, scale_format="float16")
MXFP4 = QuantSpec("e2m1", 32, scale_format="e8m0")
NVFP4 = QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True)
INT8_ASYMMETRIC = QuantSpec("int8", 32, scale_format="float16", symmetric=False)


def exact(w: Tensor, spec: QuantSpec) -> bool:
    return torch.equal(ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float32), w)


def random(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def codes(n: int, g: int, levels: int, seed: int) -> Tensor:
    return torch.randint(
        0, levels, (n, g, 32), generator=torch.Generator().manual_seed(seed)
    ).float()


@pytest.mark.parametrize("levels", [16, 13, 9, 5, 3, 2, 1])
@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize("magnitude", [2.0**-18, 2.0**-6, 3.0, 500.0])
def test_q4_1(levels: int, first: int, magnitude: float):
    n, g = 24, 6
    levels = min(levels, 16 - first)
    d = (magnitude * (0.05 + random(n, g, 1, seed=levels))).half().float()
    m = (-8 * magnitude * random(n, g, 1, seed=first)).half().float()
    w = d * (codes(n, g, levels, seed=1) + first) + m
    assert exact(w.view(n, -1), Q4_1)


def test_q4_1_whose_levels_have_gaps():
    n, g = 24, 6
    d = (0.01 + random(n, g, 1, seed=3)).half().float()
    for used in ([0, 3, 6], [0, 5], [1, 4, 15], [2, 15], [0, 7, 14]):
        w = d * torch.tensor(used)[codes(n, g, len(used), seed=2).long()].float() - d
        assert exact(w.view(n, -1), Q4_1), used


def test_constant_blocks_are_exact():
    for value in (0.0, 1.0, 0.1, -0.3, 1e-5, -1000.3):
        w = torch.full((3, 64), value).bfloat16().float()
        assert exact(w, Q4_1), value


@pytest.mark.parametrize("levels", [8, 7, 4, 2, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_q4_0_with_scales_of_both_signs(levels: int, sign: int):
    n, g = 24, 6
    d = (sign * (0.01 + random(n, g, 1, seed=levels))).half().float()
    low = codes(n, g, levels + 1, seed=1) - levels
    high = codes(n, g, levels, seed=2)
    w = d * torch.where(random(n, g, 32, seed=5) < 0.5, low, high)
    assert exact(w.view(n, -1), Q4_0)


@pytest.mark.parametrize("levels", [127, 100, 31, 1])
@pytest.mark.parametrize("spec", [Q8_0, QuantSpec("int8"), QuantSpec("int8", "tensor")], ids=str)
def test_symmetric_bytes(levels: int, spec: QuantSpec):
    n, g = 24, 6
    d = 0.01 + random(1 if spec.block == "tensor" else n, 1, seed=levels)
    if spec is Q8_0:
        d = d.half().float()
    q = codes(n, g, 2 * levels + 1, seed=1).view(n, -1) - levels
    assert exact(q * d, spec)


def test_asymmetric_bytes_that_use_every_level():
    n, g = 8, 6
    q = codes(n, g, 255, seed=1) - 127
    q[:, :, 0], q[:, :, 1] = -127, 127
    d = (0.01 + random(n, g, 1, seed=1)).half().float()
    m = random(n, g, 1, seed=2).half().float()
    assert exact((d * q + m).view(n, -1), INT8_ASYMMETRIC)


def some(spec: QuantSpec, n: int, k: int, seed: int) -> Tensor:
    """Random points of a format."""
    points = spec.codes.decode(spec.codes.codes())
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randint(0, len(points), (n, k), generator=generator)]


@pytest.mark.parametrize("magnitude", [1e-30, 1e-5, 1.0, 777.0, 1e30])
@pytest.mark.parametrize("fmt", ["e2m1", "e4m3", "int4"])
def test_blocks_with_powers_of_two_as_scales(fmt: str, magnitude: float):
    spec = QuantSpec(fmt, 32, scale_format="e8m0")
    scales = spec.scales.stored(magnitude * (0.01 + random(24, 6, 1, seed=2)))
    w = (scales * some(spec, 24, 192, 3).view(24, 6, 32)).view(24, -1)
    w[5] = 0
    w[6, 32:64] = 0
    assert exact(w, spec)


@pytest.mark.parametrize("factor", [1e-30, 0.0123, 1.0, 1e25])
@pytest.mark.parametrize("largest", [448.0, 416.0, 3.25])
@pytest.mark.parametrize("fmt", ["e2m1", "int4", "int8"])
def test_blocks_with_a_factor_of_the_tensor(fmt: str, largest: float, factor: float):
    spec = QuantSpec(fmt, 16, scale_format="e4m3", tensor_scale=True)
    scales = spec.scales.stored(largest * (0.1 + 0.9 * random(24, 12, 1, seed=2)))
    scales[3, 4] = largest
    w = (scales * some(spec, 24, 192, 3).view(24, 12, 16)).view(24, -1)
    w[5] = 0
    assert exact(w * torch.tensor(factor), spec)


def test_a_factor_is_found_in_rows_that_are_mostly_zeros():
    w = torch.zeros(64, 192)
    w[5, 3], w[9, 70] = 0.37 * 448 * 6, -0.37 * 448 * 1.5
    assert exact(w, NVFP4)


def test_a_matrix_next_to_such_blocks_gets_the_plain_factor():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    q = ROUNDINGS["nearest"].round(w, NVFP4, {})
    assert torch.equal(q.row_scales_n, (w.abs().max() / (6 * 448)).expand(8))


@pytest.mark.parametrize("fmt", ["e2m1", "e4m3", "int2", "int3"])
def test_rows_of_points(fmt: str):
    spec = QuantSpec(fmt)
    d = 0.01 + random(24, 1, seed=4)
    assert exact(d * some(spec, 24, 192, 5), spec)


def test_rounding_twice_is_rounding_once():
    w = torch.randn(16, 192, generator=torch.Generator().manual_seed(1))
    small = [QuantSpec("int2"), QuantSpec("int3", 64, scale_format="bfloat16"), MXFP4, NVFP4]
    for spec in (Q4_1, Q4_0, Q8_0, QuantSpec("int8"), QuantSpec("int4"), *small):
        assert exact(ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float32), spec), spec


def test_a_block_next_to_the_grid_is_not_taken_for_one():
    d = torch.full((2, 2, 1), 0.125)
    w = (d * codes(2, 2, 16, seed=1)).view(2, -1)
    w[1, 40] += 0.04
    back = ROUNDINGS["nearest"].round(w, Q4_1, {}).dequantize(torch.float32)
    assert torch.equal(back[0], w[0])
    assert torch.equal(back[1, :32], w[1, :32])
    assert not torch.equal(back[1, 32:], w[1, 32:])
