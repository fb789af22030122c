"""Does every compiled path of attention agree with its specification?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qpass.ops as ops
from qpass.errors import BadInput
from qpass.ops.library import specification
from qpass.runtime import native
from qpass.runtime.native import Isa
from tests.kernels.cases import paths, poisoned

FLOAT32 = 2.0**-24
FLOAT64 = 2.0**-53
# what a type computes in, and one rounding of the result to it
TYPES = {
    torch.float32: (FLOAT32, 0.0),
    torch.bfloat16: (FLOAT32, 2.0**-8),
    torch.float16: (FLOAT32, 2.0**-11),
    torch.float64: (FLOAT64, 0.0),
}
# (batch, query heads, key heads, queries, keys, width of keys, width of values)
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 9, 3, 1, 130, 64, 64),
    (2, 8, 1, 1, 300, 80, 65),
    (1, 16, 8, 2, 127, 63, 128),
    (1, 9, 3, 3, 70, 128, 63),
    (2, 2, 1, 6, 64, 65, 16),
    (1, 2, 2, 13, 63, 64, 64),
    (2, 6, 2, 40, 65, 16, 80),
    (1, 3, 1, 65, 193, 80, 1),
    (1, 8, 1, 33, 31, 1, 96),
    (1, 2, 2, 200, 136, 32, 32),
    (1, 1, 1, 70, 70, 256, 256),
    (1, 4, 4, 14, 400, 17, 15),
]

pytestmark = [
    pytest.mark.skipif(not paths(), reason=str(native.load().why)),
    pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name),
]


def drawn(
    sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous caches, and queries as a projection leaves them."""
    b, h, g, t, s, d, e = sizes
    return (
        torch.randn(b, t, h, d, generator=generator).to(dtype).transpose(1, 2),
        torch.randn(b, g, s, d, generator=generator).to(dtype),
        torch.randn(b, g, s, e, generator=generator).to(dtype),
    )


def masks(sizes: tuple[int, ...], generator: torch.Generator) -> list[Tensor | None]:
    """One mask of each kind and way to broadcast; some rows and whole blocks see nothing."""
    b, h, _, t, s, *_ = sizes
    later = torch.ones(t, s, dtype=torch.bool).tril(s - t)
    padded = torch.arange(s) >= torch.tensor([s // 3, 2 * s // 3] * b)[:b, None]
    holes = torch.rand(b, h, t, s, generator=generator) > 0.5
    holes[..., 64:128] = False
    holes[:, :, -1] = False
    lowest = torch.finfo(torch.float32).min
    return [
        None,
        later,
        (later & padded[:, None, None])[:, :1],
        holes,
        padded[:, None, None],
        torch.rand(1, h, 1, s, generator=generator) > 0.2,
        torch.rand(b, 1, t, 1, generator=generator) > 0.2,
        torch.randn(t, s, generator=generator),
        torch.zeros(b, 1, t, s).masked_fill(~later, -torch.inf),
        torch.zeros(b, 1, 1, s).masked_fill(~padded[:, None, None], lowest),
        torch.randn(h, 1, 1, generator=generator),
        torch.zeros(b, h, t, s).masked_fill(~holes, -torch.inf),
    ]


def limit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float):
    """The result in float64, and how far roundings may move it."""
    step, result = TYPES[q.dtype]
    wide = (q.double(), k.double(), v.double())
    n = q.shape[1] // k.shape[1]
    want = specification("attention")(*wide, mask, causal, scale)
    # a weight moves by the error of its score: a sum of d products, a sum with the mask, what is
    # taken off, and an exponential; a result also by sums of weights over keys
    reach = wide[0].abs() @ wide[1].abs().repeat_interleave(n, 1).mT * abs(scale)
    if mask is not None and mask.dtype is not torch.bool:
        reach = reach + mask.masked_fill(mask.abs() > 1e30, 0).double().abs()
    reach = reach.amax(-1, keepdim=True)
    scores = 2 * (q.shape[3] + 8) * reach
    sizes = specification("attention")(wide[0], wide[1], wide[2].abs(), mask, causal, scale)
    return want, sizes * step * (scores + k.shape[2] + 16) + want.abs() * result


def check(
    isa: Isa, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    with native.capped(isa), poisoned():
        got = ops.attention(q, k, v, mask, causal, scale)
    want, far = limit(q, k, v, mask, causal, scale)
    assert got.dtype is q.dtype
    assert got.shape == want.shape
    assert got.transpose(1, 2).is_contiguous()
    assert ((got.double() - want).abs() <= far).all()
    return got


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(isa: Isa, sizes: tuple[int, ...], causal: bool) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    for i, mask in enumerate(masks(sizes, generator)):
        # with the sizes, every mask meets every type
        dtype = list(TYPES)[(i + sum(sizes)) % len(TYPES)]
        q, k, v = drawn(sizes, dtype, generator)
        typed = mask if mask is None or mask.dtype is torch.bool or i % 2 else mask.to(dtype)
        check(isa, q, k, v, typed, causal, 0.9 * sizes[5] ** -0.5)


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("t", [1, 30])
def test_strides(isa: Isa, dtype: torch.dtype, t: int) -> None:
    """Slices of a cache full of NaN are read where they are; other layouts mean the same."""
    generator = torch.Generator().manual_seed(t)
    q, k, v = drawn((2, 6, 2, t, 75, 20, 24), dtype, generator)
    keep = torch.rand(2, 1, t, 75, generator=generator) > 0.3
    first = check(isa, q, k, v, keep, False, 0.2)
    cache = torch.full((2, 3, 99, 50), torch.nan, dtype=dtype)
    keys, values = cache[:, :2, 7:82, 3:23], cache[:, :2, 7:82, 25:49]
    keys.copy_(k)
    values.copy_(v)
    wide_mask = torch.ones(2, 3, t, 99, dtype=torch.bool)
    mask = wide_mask[:, 1:2, :, 9:84]
    mask.copy_(keep)
    assert torch.equal(check(isa, q.contiguous(), keys, values, mask, False, 0.2), first)
    # no axis where it is expected
    backwards = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k, v, keep)]
    assert torch.equal(check(isa, *backwards, False, 0.2), first)
    spread = [
        torch.stack((x, x), -1).flatten(-2)[..., ::2] if x.dtype is not torch.bool else x
        for x in (q, k, v)
    ]
    assert torch.equal(check(isa, *spread, keep.expand(2, 6, t, 75), False, 0.2), first)
    every = torch.ones(1, 1, dtype=torch.bool).expand(t, 75)
    assert torch.equal(
        check(isa, q, k, v, every, False, 0.2), check(isa, q, k, v, None, False, 0.2)
    )
    shared = k[:, :1].expand(2, 2, 75, 20)
    check(isa, q, shared, v[:1].expand(2, 2, 75, 24), None, True, 0.2)


@pytest.mark.parametrize("t", [1, 4, 40])
def test_nothing_is_lost_while_scores_grow_or_shrink(isa: Isa, t: int) -> None:
    """The largest score moves with every block, by more than an exponential can bear."""
    generator = torch.Generator().manual_seed(t)
    q, k, v = drawn((1, 2, 1, t, 500, 16, 16), torch.float64, generator)
    for order in (torch.arange(500), torch.arange(499, -1, -1), torch.randperm(500)):
        for step in (0.01, 1.0, 300.0):
            slope = (order * step).float()[None, None, None]
            # what is exact in float32 leaves the tolerance to the rest
            check(isa, q, k, v, slope, False, 0.25)
            check(isa, q.float(), k.float(), v.float(), slope, False, 0.25)


@pytest.mark.parametrize("t", [1, 3, 40])
def test_a_row_that_sees_nothing_is_zero(isa: Isa, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    q, k, v = drawn((1, 4, 2, t, 150, 16, 16), torch.float32, generator)
    mask = torch.ones(t, 150, dtype=torch.bool)
    mask[t // 2] = False
    added = torch.zeros(t, 150).masked_fill(~mask, -torch.inf)
    lowest = torch.full((t, 150), torch.finfo(torch.float32).min)
    with native.capped(isa), poisoned():
        for m in (mask, added):
            got = ops.attention(q, k, v, m, False, 1.0)
            assert (got[:, :, t // 2] == 0).all()
            assert (got[:, :, : t // 2] != 0).all()
        # the lowest finite number hides nothing from a row that has nothing better
        got = ops.attention(q * 0, k, v, lowest, False, 1.0)
        mean = v.mean(2).repeat_interleave(2, 1)[:, :, None].expand_as(got)
        torch.testing.assert_close(got, mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("t", [1, 5, 40])
@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
def test_values_that_are_not_finite_stay_so(isa: Isa, t: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(t)
    sizes = (1, 2, 1, t, 150, 16, 16)
    for bad in (torch.nan, torch.inf):
        q, k, v = drawn(sizes, dtype, generator)
        q[0, 1, t - 1, 3] = bad
        with native.capped(isa):
            got = ops.attention(q, k, v, None, False, 1.0)
        assert got[0, 1, t - 1].isnan().all()
        assert got[0, 0].isfinite().all()
        assert got[0, :, : t - 1].isfinite().all()
        q, k, v = drawn(sizes, dtype, generator)
        v[0, 0, 149, 5] = bad
        with native.capped(isa):
            got = ops.attention(q, k, v, None, False, 0.01)
        assert not got[..., 5].isfinite().any()
        assert got[..., :5].isfinite().all()
        # every row sees this key, so every row is NaN, in whichever block it lies
        for key in (0, 100):
            q, k, v = drawn(sizes, dtype, generator)
            k[0, 0, key, 5] = torch.nan
            with native.capped(isa):
                assert ops.attention(q, k, v, None, False, 1.0).isnan().all()


def test_results_do_not_depend_on_threads_or_repeats(isa: Isa) -> None:
    generator = torch.Generator().manual_seed(8)
    before = torch.get_num_threads()
    for sizes in ((1, 6, 2, 300, 300, 16, 16), (1, 6, 2, 1, 900, 16, 16), (1, 1, 1, 30, 700, 8, 8)):
        q, k, v = drawn(sizes, torch.float32, generator)
        results: list[Tensor] = []
        with native.capped(isa):
            for threads in (1, 2, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.attention(q, k, v, None, True, 0.25))
        torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


def test_a_prefix_of_the_cache_is_all_that_counts(isa: Isa) -> None:
    """One row at a time, with what a fixed cache does not hold yet masked, equals all at once."""
    generator = torch.Generator().manual_seed(9)
    q, k, v = drawn((1, 6, 2, 80, 80, 16, 16), torch.float32, generator)
    k = torch.cat((k, torch.zeros(1, 2, 120, 16)), 2)
    v = torch.cat((v, torch.zeros(1, 2, 120, 16)), 2)
    whole, far = limit(q, k[:, :, :80], v[:, :, :80], None, True, 0.25)
    for t in (0, 1, 17, 63, 64, 79):
        mask = (torch.arange(200) <= t)[None, None, None]
        with native.capped(isa), poisoned():
            got = ops.attention(q[:, :, t : t + 1], k, v, mask, False, 0.25)
        assert ((got - whole[:, :, t : t + 1]).abs() <= far[:, :, t : t + 1]).all()


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 2, 1, 3, 4, 8, 8),
        (2, 0, 1, 3, 4, 8, 8),
        (2, 2, 1, 0, 4, 8, 8),
        (2, 2, 1, 3, 0, 8, 8),
        (2, 2, 1, 30, 0, 8, 8),
        (2, 2, 1, 3, 4, 0, 8),
        (2, 2, 1, 30, 4, 0, 8),
        (2, 2, 1, 3, 4, 8, 0),
    ],
    ids=str,
)
def test_nothing_of_something(isa: Isa, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in TYPES:
        q, k, v = drawn(sizes, dtype, generator)
        for mask in (None, torch.ones(sizes[3], sizes[4], dtype=torch.bool), torch.zeros(1)):
            with native.capped(isa), poisoned():
                got = ops.attention(q, k, v, mask, False, 0.5)
            want = specification("attention")(q, k, v, mask, False, 0.5)
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want)


def test_the_choice_is_explained(isa: Isa) -> None:
    q = torch.randn(2, 6, 5, 16)
    k = torch.randn(2, 2, 9, 16)
    for dtype, mask in (
        (torch.float32, None),
        (torch.float16, torch.ones(5, 9, dtype=torch.bool)),
        (torch.float64, None),
        (torch.bfloat16, torch.ones(5, 9, dtype=torch.float64)),
    ):
        with native.capped(isa):
            choice = native.explain_attention(q.to(dtype), k.to(dtype), k.to(dtype), mask)
        assert choice.kernel.startswith("attention_")
        known = {refusal.kernel: refusal.why for refusal in choice.refused}
        if dtype is torch.float64 and isa >= Isa.AVX512VNNI:
            assert "float64" in known["attention_avx512vnni"]
        if dtype is torch.bfloat16 and isa >= Isa.AVX512VNNI:
            assert "mask" in known["attention_avx512vnni"]
    with pytest.raises(BadInput, match="int32"):
        native.explain_attention(q.int(), k.int(), k.int(), None)


def test_arguments_that_do_not_fit_are_refused(isa: Isa) -> None:
    q, k, v = drawn((1, 6, 2, 5, 7, 4, 4), torch.float32, torch.Generator().manual_seed(1))
    with native.capped(isa):
        for arguments, why in (
            ((q[0], k, v, None), "length, width"),
            ((q[..., :3], k, v, None), "do not fit together"),
            ((q, k[:, :, :6], v, None), "do not fit together"),
            ((q[:, :5], k, v, None), "no multiple"),
            ((q[:, :0], k[:, :0], v[:, :0], None), "no multiple"),
            ((q.half(), k, v, None), "share one dtype"),
            ((q.int(), k.int(), v.int(), None), "floating"),
            ((q, k, v, torch.ones(5, 7, dtype=torch.int32)), "floating"),
            ((q, k, v, torch.ones(4, 7)), "does not broadcast"),
            ((q, k, v, torch.ones(1, 1, 1, 5, 7)), "four dimensions"),
        ):
            with pytest.raises(ValueError, match=why):
                ops.attention(*arguments, False, 1.0)
