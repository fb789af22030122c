"""Is a branch of low rank added before the result is rounded, and to what it belongs to?"""

from __future__ import annotations

import pytest
import torch

from qpass.errors import BadInput
from qpass.ops import (
    linear_codes,
    linear_codes_low_rank,
    linear_real,
    linear_real_low_rank,
    quantize_rows,
)
from tests.kernels.cases import KINDS, random_packed

N, K, R = 21, 48, 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_branch_is_added_before_rounding(kind, dtype):
    g = torch.Generator().manual_seed(0)
    held, bias = random_packed(N, K, 3, kind, g), torch.randn(N, generator=g)
    x = torch.randn(2, 3, K, generator=g).to(dtype)
    low, up = (torch.randn(*shape, R, generator=g).to(dtype) for shape in ((2, 3), (N,)))
    beside = low.double() @ up.double().T
    got = linear_real_low_rank(x, held, bias, low, up)
    want = linear_real(x.double(), held, bias.double()) + beside
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    assert got.dtype is dtype
    assert (got.double() - want).abs().max() <= close * want.abs().max()
    codes, scales = quantize_rows(x, 8)
    got = linear_codes_low_rank(codes, scales, held, bias, dtype, low, up)
    want = linear_codes(codes, scales, held, bias, torch.float64) + beside
    assert got.dtype is dtype
    assert (got.double() - want).abs().max() <= max(close, 1e-5) * want.abs().max()


def test_branches_that_do_not_fit_are_refused():
    g = torch.Generator().manual_seed(0)
    held, x = random_packed(N, K, 3, KINDS[0], g), torch.randn(4, K)
    low, up = torch.randn(4, R), torch.randn(N, R)
    for wrong, why in (
        ((low[:3], up), "low has shape"),
        ((low, up[:3]), "up has shape"),
        ((low[:, :2], up), "low has shape"),
        ((low.half(), up), "share a floating type"),
        ((low.int(), up.int()), "share a floating type"),
    ):
        with pytest.raises(BadInput, match=why):
            linear_real_low_rank(x, held, None, *wrong)


def test_fakes_have_its_shape():
    g = torch.Generator().manual_seed(0)
    held = random_packed(N, K, 3, KINDS[0], g)
    parts = (held.weight, held.row_scales, None, None, None, 8, K, N)
    low, up = torch.randn(2, 3, R, device="meta"), torch.randn(N, R, device="meta")
    x = torch.randn(2, 3, K, device="meta", dtype=torch.float16)
    there = tuple(p.to("meta") if isinstance(p, torch.Tensor) else p for p in parts)
    found = torch.ops.qpass.linear.real_low_rank(x, *there, low, up)
    assert (found.shape, found.dtype) == ((2, 3, N), torch.float16)
    codes, scales = quantize_rows(x, 8)
    found = torch.ops.qpass.linear.codes_low_rank(codes, scales, *there, torch.float32, low, up)
    assert (found.shape, found.dtype) == ((2, 3, N), torch.float32)
