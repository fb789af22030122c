"""Weights that already lie on a grid keep their codes: nothing is lost by rounding them again."""

import pytest
import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS

Q4_1 = QuantSpec("int4", 32, scale_format="float16", symmetric=False)
Q4_0 = QuantSpec("int4", 32, scale_format="float16")
Q8_0 = QuantSpec("int8", 32, scale_format="float16")
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


def test_rounding_twice_is_rounding_once():
    w = torch.randn(16, 192, generator=torch.Generator().manual_seed(1))
    for spec in (Q4_1, Q4_0, Q8_0, QuantSpec("int8"), QuantSpec("int4")):
        assert exact(ROUNDINGS["nearest"].round(w, spec, {}).dequantize(torch.float32), spec), spec


def test_a_block_next_to_the_grid_is_not_taken_for_one():
    d = torch.full((2, 2, 1), 0.125)
    w = (d * codes(2, 2, 16, seed=1)).view(2, -1)
    w[1, 40] += 0.04
    back = ROUNDINGS["nearest"].round(w, Q4_1, {}).dequantize(torch.float32)
    assert torch.equal(back[0], w[0])
    assert torch.equal(back[1, :32], w[1, :32])
    assert not torch.equal(back[1, 32:], w[1, 32:])
