"""Does a product by stacked experts give each row what its own expert gives it?"""

from __future__ import annotations

import pytest
import torch

from qpass.errors import BadInput
from qpass.ops import linear_experts, pack_experts
from qpass.ops.library import specification
from tests.kernels.cases import KINDS, random_packed

N, K = 21, 48
ENDS = (3, 3, 10, 11)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_run_of_rows_meets_its_expert(kind, dtype):
    g = torch.Generator().manual_seed(0)
    experts = [random_packed(N, K, 3, kind, g) for _ in ENDS]
    x = torch.randn(13, K, generator=g).to(dtype)
    bias = torch.randn(len(ENDS), N, generator=g)
    got = linear_experts(x, torch.tensor(ENDS), pack_experts(experts), bias)
    assert got.dtype is dtype
    start = 0
    for one, end, b in zip(experts, ENDS, bias, strict=True):
        parts = (one.weight, one.row_scales, one.group_scales, one.group_offsets, b, one.bits, K, N)
        # its meaning, whichever kernels other tests have loaded
        assert torch.equal(got[start:end], specification("linear.real")(x[start:end], *parts))
        start = end
    # rows of no expert
    assert torch.equal(got[11:], torch.zeros(2, N, dtype=dtype))


def test_fakes_have_its_shape():
    held = pack_experts([random_packed(N, K, 3, (4, True, True), torch.Generator())] * 2)
    x, ends = torch.randn(5, K), torch.tensor([1, 5], dtype=torch.int32)
    with torch.device("meta"):
        fake = torch.ops.qpass.linear.experts(
            x.to("meta"), ends.to("meta"), held.weight, held.row_scales, held.group_scales,
            held.group_offsets, None, 4, K, N,
        )  # fmt: skip
    assert fake.shape == linear_experts(x, ends, held).shape == (5, N)


def test_what_does_not_fit_is_refused():
    g = torch.Generator().manual_seed(0)
    one = random_packed(N, K, 3, (4, True, False), g)
    held, x = pack_experts([one, one]), torch.randn(5, K)
    for ends, why in (
        (torch.tensor([3, 2]), r"ends\[1\] is 2"),
        (torch.tensor([3, 6]), r"ends\[1\] is 6"),
        (torch.tensor([-1, 5]), r"ends\[0\] is -1"),
        (torch.tensor([3.0, 5.0]), "one integer"),
        (torch.tensor([5]), "1 ends"),
    ):
        with pytest.raises(BadInput, match=why):
            linear_experts(x, ends, held)
    with pytest.raises(BadInput, match="rows"):
        linear_experts(x[None], torch.tensor([3, 5]), held)
    with pytest.raises(BadInput, match="features"):
        linear_experts(x[:, :7], torch.tensor([3, 5]), held)
    with pytest.raises(BadInput, match="alike"):
        pack_experts([one, random_packed(N, K, 3, (8, True, False), g)])
