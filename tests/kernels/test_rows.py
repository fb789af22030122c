"""Does every compiled path rotate, quantize and look up as the specifications say?"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import qpass.ops as ops
from qpass.ops.library import specification
from qpass.runtime import native
from qpass.runtime.native import Isa
from tests.kernels.cases import paths, poisoned

# float32 roundings of a transform: one for each butterfly stage and each product of the factor
FLOAT32 = 2.0**-24
RESULT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}

# (blocks, order of the factor, power)
TRANSFORMS = [
    (1, 1, 1), (1, 3, 1), (5, 1, 2), (1, 5, 4), (3, 3, 8), (1, 1, 16), (2, 7, 16), (1, 36, 16),
    (1, 12, 128), (1, 9, 64), (3, 1, 32), (1, 1, 512), (1, 13, 16), (2, 2, 1024),
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not paths(), reason=str(native.load().why)),
    pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name),
]


def transform(n: int, order: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    signs = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
    return signs, torch.linalg.qr(torch.randn(order, order, generator=generator)).Q.contiguous()


@pytest.mark.parametrize(("blocks", "order", "power"), TRANSFORMS)
@pytest.mark.parametrize("m", [1, 3, 20])
def test_hadamard(isa: Isa, blocks: int, order: int, power: int, m: int) -> None:
    generator = torch.Generator().manual_seed(order * power + m)
    n = blocks * order * power
    signs, factor = transform(n, order, generator)
    for dtype, rounding in RESULT.items():
        x = torch.randn(m, n, generator=generator).to(dtype)
        with native.capped(isa), poisoned():
            got = ops.hadamard(x, signs, factor, power)
        want = specification("hadamard")(x.double(), signs, factor, power)
        assert got.dtype is dtype
        largest = x.double().norm(dim=-1, keepdim=True)
        steps = FLOAT32 * (order + power.bit_length() + 4)
        limit = largest * steps + rounding * want.abs()
        assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 33, 64, 100, 576])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_is_exact(isa: Isa, n: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(n + bits)
    for dtype in RESULT:
        x = (torch.randn(2, 5, n, generator=generator) * 3).to(dtype)
        x[0, 0] = 0
        x[0, 1, 0] = torch.nan
        x[0, 2, -1] = -torch.inf
        x[0, 3] = x[0, 3].sign() * 1e-36
        # multiples of a half: ties, which go to the even code
        x[1, 0] = torch.arange(n) % 2**bits / 2
        x[1, 0, 0] = 2 ** (bits - 1) - 1
        with native.capped(isa), poisoned():
            codes, scales = ops.quantize_rows(x, bits)
        want_codes, want_scales = specification("quantize_rows")(x, bits)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scales.nan_to_num(nan=-1), want_scales.nan_to_num(nan=-1))


@pytest.mark.parametrize("n", [1, 17, 100])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-127, 127), (-128, 127), (-2, 1)])
def test_clipped_rows_are_exact(isa: Isa, n: int, low: int, high: int) -> None:
    clipped = torch.ops.qpass.quantize_rows.clipped
    for dtype, clip in itertools.product(RESULT, (0.7, 0.96, 1.0)):
        x = torch.randn(6, n, generator=torch.Generator().manual_seed(n)).to(dtype)
        x[0] = 0
        x[1, 0] = torch.nan
        with native.capped(isa), poisoned():
            codes, scales = clipped(x, low, high, clip)
        want_codes, want_scales = specification("quantize_rows.clipped")(x, low, high, clip)
        assert torch.equal(codes, want_codes)
        assert torch.equal(scales.nan_to_num(nan=-1), want_scales.nan_to_num(nan=-1))


@pytest.mark.parametrize(("blocks", "order", "power"), TRANSFORMS)
@pytest.mark.parametrize("dtype", list(RESULT))
def test_rotating_and_quantizing(
    isa: Isa, blocks: int, order: int, power: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(order * power)
    n = blocks * order * power
    signs, factor = transform(n, order, generator)
    x = torch.randn(7, n, generator=generator).to(dtype)
    x[1, 0] = torch.inf
    x[2] = 0
    with native.capped(isa), poisoned():
        codes, scales = ops.quantize_rows(x, 8, signs, factor, power)
    finite = torch.tensor([0, 2, 3, 4, 5, 6])
    assert scales[1].isnan().all()
    assert (codes[1] == 0).all()
    assert (codes[2] == 0).all()
    assert (scales[2] == 0).all()
    want = specification("hadamard")(x.double(), signs, factor, power)[finite]
    error = (codes[finite] * scales[finite].double() - want).abs()
    # half a step, and the float32 rounding of the transform
    assert (error <= scales[finite] * 0.5001 + want.norm(dim=-1, keepdim=True) * 1e-5).all()
    rest = finite[finite != 2]
    assert (codes[rest].abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", list(RESULT))
@pytest.mark.parametrize("n", [1, 15, 48, 67])
def test_embedding(isa: Isa, dtype: torch.dtype, n: int) -> None:
    codes = torch.randint(-128, 128, (23, n), dtype=torch.int16).to(torch.int8)
    scales = torch.rand(23)
    for indices in (
        torch.tensor([[0, 22, 5], [5, 1, 2]]),
        torch.tensor(3),
        torch.tensor([], dtype=torch.long),
        torch.tensor([4, 4], dtype=torch.int32),
    ):
        with native.capped(isa), poisoned():
            got = ops.embedding(indices, codes, scales, dtype)
        want = specification("embedding")(indices, codes, scales, dtype)
        assert torch.equal(got, want)


def test_embedding_refuses_indices_outside(isa: Isa) -> None:
    codes, scales = torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    with native.capped(isa):
        for index in (-1, 3):
            with pytest.raises(IndexError, match="outside the table of 3 rows"):
                ops.embedding(torch.tensor([index]), codes, scales, torch.float32)
