"""Does attention mean what PyTorch's does, and what its documentation says?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import qpass.ops as ops
from qpass.errors import BadInput
from qpass.ops.library import specification

# a few float64 roundings of sums of numbers near 1
FLOAT64 = 1e-13
# (batch, query heads, key heads, queries, keys, width of keys, width of values)
SIZES = [
    (2, 6, 2, 5, 7, 4, 4),
    (1, 3, 3, 7, 5, 3, 6),
    (2, 4, 1, 1, 9, 8, 8),
    (1, 2, 2, 4, 1, 1, 1),
]
# the leading sizes that a mask may have; True stands for the full size
BROADCASTS = [
    (True, True, True, True),
    (True, True),
    (False, False, True, True),
    (True, False, True, True),
    (True, False, False, True),
    (False, True, False, True),
    (False, False, True, False),
    (True,),
]

define = specification("attention")


def drawn(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    b, h, g, t, s, d, e = sizes
    return (
        torch.randn(b, h, t, d).to(dtype),
        torch.randn(b, g, s, d).to(dtype),
        torch.randn(b, g, s, e).to(dtype),
    )


def aten(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float):
    """PyTorch's own, in the plain formula."""
    n = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_attention_of_pytorch(sizes: tuple[int, ...], causal: bool) -> None:
    q, k, v = drawn(sizes)
    got = define(q, k, v, None, causal, 0.3)
    torch.testing.assert_close(got, aten(q, k, v, None, causal, 0.3), atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("broadcast", BROADCASTS, ids=str)
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_broadcast(sizes: tuple[int, ...], broadcast: tuple[bool, ...], boolean: bool):
    q, k, v = drawn(sizes)
    b, h, _, t, s, *_ = sizes
    full = (b, h, t, s)[4 - len(broadcast) :]
    shape = [size if whole else 1 for size, whole in zip(full, broadcast, strict=True)]
    mask = torch.rand(shape) > 0.5 if boolean else torch.randn(shape, dtype=torch.float64)
    want = aten(q, k, v, mask, False, 0.5)
    torch.testing.assert_close(define(q, k, v, mask, False, 0.5), want, atol=FLOAT64, rtol=0)
    seen = torch.ones(t, s, dtype=torch.bool).tril()
    both = mask & seen if boolean else mask.masked_fill(~seen, -torch.inf)
    want = aten(q, k, v, both, False, 0.5)
    torch.testing.assert_close(define(q, k, v, mask, True, 0.5), want, atol=FLOAT64, rtol=0)


def test_a_query_that_sees_nothing_gets_zero() -> None:
    q, k, v = drawn((1, 2, 1, 3, 5, 4, 4))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    added = torch.zeros(3, 5).masked_fill(~mask, -torch.inf)
    for m in (mask, added):
        got = define(q, k, v, m, False, 1.0)
        assert torch.equal(got[:, :, 1], torch.zeros(1, 2, 4, dtype=torch.float64))
        assert (got[:, :, [0, 2]] != 0).all()
        assert torch.equal(
            aten(q, k, v, m.to(q.dtype) if m is added else m, False, 1.0) == 0, got == 0
        )
    nothing = define(q, k[:, :, :0], v[:, :, :0], None, False, 1.0)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_the_lowest_finite_mask_hides_no_key_from_a_row_of_its_own() -> None:
    q, k, v = drawn((1, 2, 1, 3, 5, 4, 4), torch.float32)
    got = define(q, k, v, torch.full((3, 5), torch.finfo(torch.float32).min), False, 1.0)
    torch.testing.assert_close(got, v.mean(2, keepdim=True).expand_as(got), atol=1e-6, rtol=0)


def test_what_is_not_finite_reaches_its_own_results_only() -> None:
    q, k, v = drawn((1, 2, 1, 3, 5, 4, 4), torch.float32)
    q[0, 1, 2, 0] = torch.nan
    v[0, 0, 3, 1] = torch.inf
    got = define(q, k, v, None, False, 1.0)
    assert got[0, 1, 2].isnan().all()
    assert not got[0, 0].isnan().any()
    assert got[0, 0, :, 1].isinf().all()
    assert got[0, 0, :, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = drawn((2, 6, 2, 5, 70, 16, 16), dtype)
    got = define(q, k, v, None, False, 0.25)
    want = define(q.float(), k.float(), v.float(), None, False, 0.25)
    assert got.dtype is dtype
    assert torch.equal(got, want.to(dtype))


def test_the_result_lies_as_the_next_reshape_wants_it() -> None:
    q, k, v = drawn((2, 6, 2, 5, 7, 4, 3), torch.float32)
    for result in (ops.attention(q, k, v, None, False, 1.0), define(q, k, v, None, False, 1.0)):
        assert result.shape == (2, 6, 5, 3)
        assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("sizes", [*SIZES, (0, 2, 1, 3, 4, 8, 8), (1, 2, 1, 0, 4, 8, 8)], ids=str)
def test_schema_and_shapes_agree_with_the_specification(sizes: tuple[int, ...]) -> None:
    q, k, v = drawn(sizes, torch.float32)
    for mask in (None, torch.ones(sizes[3], sizes[4], dtype=torch.bool)):
        torch.library.opcheck(
            torch.ops.qpass.attention.default,
            (q, k, v, mask, mask is None, 0.5),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_export_keeps_sizes_symbolic() -> None:
    class Net(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(q, k, v, None, True, 0.5)

    length = torch.export.Dim("length", min=2)
    arguments = drawn((1, 4, 2, 5, 5, 8, 8), torch.float32)
    program = torch.export.export(Net(), arguments, dynamic_shapes=({2: length},) * 3)
    assert "qpass.attention.default" in {str(node.target) for node in program.graph.nodes}
    longer = drawn((1, 4, 2, 9, 9, 8, 8), torch.float32)
    assert torch.equal(program.module()(*longer), Net()(*longer))


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = drawn((1, 6, 2, 5, 7, 4, 4), torch.float32)
    for arguments, why in (
        ((q[0], k, v, None), "tensors, got"),
        ((q[..., :3], k, v, None), "do not fit together"),
        ((q, k[:, :, :6], v, None), "do not fit together"),
        ((q[:, :5], k, v, None), "no multiple"),
        ((q[:, :0], k[:, :0], v[:, :0], None), "no multiple"),
        ((q.half(), k, v, None), "one floating dtype"),
        ((q.int(), k.int(), v.int(), None), "one floating dtype"),
        ((q, k, v, torch.ones(5, 7, dtype=torch.int32)), "boolean or floating"),
        ((q, k, v, torch.ones(4, 7)), "does not broadcast"),
        ((q, k, v, torch.ones(1, 1, 1, 5, 7)), "does not broadcast"),
    ):
        with pytest.raises(BadInput, match=why):
            define(*arguments, False, 1.0)
