"""Does every compiled path of the linear operators agree with their specification?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qpass.ops as ops
from qpass.ops.library import specification
from qpass.runtime import native
from qpass.runtime.native import Isa
from tests.kernels.cases import KINDS, paths, poisoned, random_packed

# the specification and a kernel round the same few float32 operations in another order: this many
# roundings of the largest partial sum
ROUNDINGS = 8
FLOAT32 = 2.0**-24
# one rounding of the result to its dtype
RESULT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

MS = (1, 2, 3, 5, 17, 64)
NS = (1, 15, 16, 17, 33, 63)
# columns and groups: whole lines, broken lines, one group, many groups
KS = (
    (1, 1),
    (3, 3),
    (4, 1),
    (31, 1),
    (32, 1),
    (63, 3),
    (64, 2),
    (65, 5),
    (100, 4),
    (576, 18),
    (576, 9),
)

needs_library = pytest.mark.skipif(not paths(), reason=str(native.load().why))


def arguments(p: ops.PackedLinear, bias: Tensor | None) -> tuple[object, ...]:
    scales = (p.group_scales, p.group_offsets)
    return p.weight, p.row_scales, *scales, bias, p.bits, p.in_features, p.out_features


def reach(packed: ops.PackedLinear, value: Tensor) -> Tensor:
    """The largest that partial sums can get, for each output: sums of magnitudes."""
    q = ops.packing.unpack(
        packed.weight,
        packed.bits,
        (packed.out_features, packed.in_features),
        1 if packed.group_scales is None else packed.group_scales.shape[1],
        signed=packed.bits == 8 or packed.group_offsets is None,
    )
    w = q.double().abs().reshape(packed.out_features, -1, 1)
    if packed.group_scales is not None:
        s = ops.packing.untile(packed.group_scales, packed.out_features).double()
        w = q.double().abs().reshape(*s.shape, -1) * s[..., None].abs()
    if packed.group_offsets is not None:
        w = (
            w
            + ops.packing.untile(packed.group_offsets, packed.out_features)
            .double()
            .abs()[..., None]
        )
    w = w.reshape(packed.out_features, -1) * packed.row_scales.double().abs()[:, None]
    return value.double().abs() @ w.T


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("k", "groups"), KS)
def test_integer_activations(isa: Isa, kind: tuple[int, bool, bool], k: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(k * 100 + groups)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # every second size: with the many numbers of columns, all are met
    for i, n in enumerate(NS[k % 2 :: 2]):
        packed = random_packed(n, k, groups, kind, generator)
        # every second pair: each number of rows meets odd and even sizes, each size three of them
        for j, m in enumerate(MS[i % 2 :: 2]):
            codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
            scales = torch.rand(m, 1, generator=generator) / 100
            bias = torch.randn(n, generator=generator) if (i + j) % 2 else None
            dtype = dtypes[(i + j) % 3]
            call = (codes, scales, *arguments(packed, bias))
            with native.capped(isa), poisoned():
                got = torch.ops.qpass.linear.codes(*call, dtype)
            want = specification("linear.codes")(*call, torch.float32)
            assert got.dtype is dtype
            limit = ROUNDINGS * FLOAT32 * reach(packed, codes * scales) + FLOAT32 * 8
            limit = limit + RESULT[dtype] * want.abs().double()
            assert ((got.double() - want.double()).abs() <= limit).all(), (m, n)


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("m", [1, 2, 13, 40])
def test_integer_sums_are_exact(isa: Isa, kind: tuple[int, bool, bool], m: int) -> None:
    """With scales of 1 every result is an integer: no bit of any sum may be lost."""
    n, k, groups = 35, 192, 3
    generator = torch.Generator().manual_seed(m)
    packed = random_packed(n, k, groups, kind, generator)
    ones = {
        "row_scales": torch.ones_like(packed.row_scales),
        "group_scales": None
        if packed.group_scales is None
        else torch.ones_like(packed.group_scales),
        "group_offsets": None
        if packed.group_offsets is None
        else torch.full_like(packed.group_offsets, -3.0),
    }
    packed = ops.PackedLinear(
        packed.weight, **ones, bits=packed.bits, in_features=k, out_features=n
    )
    # the extremes of both ranges: what would saturate a narrower sum
    codes = torch.randint(0, 2, (m, k), generator=generator).to(torch.int8) * -127 | 1
    with native.capped(isa), poisoned():
        got = ops.linear_codes(codes, torch.ones(m, 1), packed, None, torch.float32)
    eye = torch.eye(k, dtype=torch.float64)
    dense = specification("linear.real")(eye, *arguments(packed, None)).T
    assert torch.equal(got.double(), codes.double() @ dense.T)


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("k", "groups"), KS)
def test_float_activations(isa: Isa, kind: tuple[int, bool, bool], k: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(k * 100 + groups)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # every second size: with the many numbers of columns, all are met
    for i, n in enumerate(NS[k % 2 :: 2]):
        packed = random_packed(n, k, groups, kind, generator)
        # every second pair: each number of rows meets odd and even sizes, each size three of them
        for j, m in enumerate(MS[i % 2 :: 2]):
            dtype = dtypes[(i + j) % 3]
            x = torch.randn(m, k, generator=generator).to(dtype)
            bias = torch.randn(n, generator=generator).to(dtype) if (i + j) % 2 else None
            call = (x, *arguments(packed, bias))
            with native.capped(isa), poisoned():
                got = torch.ops.qpass.linear.real(*call)
            wide = tuple(a.double() if a is bias and a is not None else a for a in call[1:])
            want = specification("linear.real")(x.double(), *wide)
            assert got.dtype is dtype
            # sums of k products in any order; tiles of bfloat16 also round each weight
            step = FLOAT32
            if dtype is torch.bfloat16 and isa in (Isa.AMX, Isa.AMX_EMULATED):
                step = 2.0**-8 / (k + ROUNDINGS)
            limit = (k + ROUNDINGS) * step * reach(packed, x) + RESULT[dtype] * want.abs() + 1e-6
            assert ((got.double() - want).abs() <= limit).all(), (m, n)


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_hot_activations_read_the_weight_out(isa: Isa, kind: tuple[int, bool, bool]) -> None:
    n, k, groups = 21, 40, 5
    packed = random_packed(n, k, groups, kind, torch.Generator().manual_seed(3))
    want = specification("linear.real")(torch.eye(k), *arguments(packed, None))
    with native.capped(isa), poisoned():
        for rows in (slice(0, 1), slice(7, 10), slice(0, k)):
            eye = torch.eye(k)[rows]
            real = ops.linear_real(eye, packed, None)
            codes = ops.linear_codes(
                eye.to(torch.int8), torch.ones(len(eye), 1), packed, None, torch.float32
            )
            torch.testing.assert_close(real, want[rows], atol=0, rtol=2**-21)
            torch.testing.assert_close(codes, want[rows], atol=0, rtol=2**-21)


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
def test_layouts_leading_sizes_and_empty_batches(isa: Isa) -> None:
    packed = random_packed(19, 24, 3, (4, True, True), torch.Generator().manual_seed(4))
    x = torch.randn(24, 3, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    with native.capped(isa), poisoned():
        codes, scales = ops.quantize_rows(x, 8)
        got = ops.linear_codes(codes, scales, packed, None, torch.float32)
        again = ops.linear_codes(
            codes.contiguous(), scales.contiguous(), packed, None, torch.float32
        )
        assert got.shape == (2, 3, 19)
        assert torch.equal(got, again)
        assert torch.equal(
            ops.linear_real(x, packed, None), ops.linear_real(x.clone(), packed, None)
        )
        assert ops.linear_real(torch.empty(0, 4, 24), packed, None).shape == (0, 4, 19)
        assert ops.linear_real(torch.randn(24), packed, None).shape == (19,)


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_results_do_not_depend_on_threads_or_repeats(
    isa: Isa, kind: tuple[int, bool, bool]
) -> None:
    packed = random_packed(272, 128, 4, kind, torch.Generator().manual_seed(5))
    x = torch.randn(130, 128)
    before = torch.get_num_threads()
    results: list[tuple[Tensor, Tensor]] = []
    with native.capped(isa):
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            codes, scales = ops.quantize_rows(x, 8)
            y = ops.linear_codes(codes, scales, packed, None, torch.float32)
            results.append((y, ops.linear_real(x, packed, None)))
    torch.set_num_threads(before)
    for y, z in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(z, results[0][1])


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
def test_values_that_are_not_finite_stay_so(isa: Isa) -> None:
    packed = random_packed(5, 8, 1, (8, False, False), torch.Generator().manual_seed(6))
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    with native.capped(isa):
        codes, scales = ops.quantize_rows(x, 8)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = ops.linear_codes(codes, scales, packed, None, dtype)
            assert y[1].isnan().all()
            assert y[[0, 2]].isfinite().all()
            z = ops.linear_real(x.to(dtype), packed, None)
            assert z[1].isnan().all()
            assert z[[0, 2]].isfinite().all()


@needs_library
@pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("type_", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_may_have_another_type(isa: Isa, type_: torch.dtype) -> None:
    n, k = 35, 40
    generator = torch.Generator().manual_seed(0)
    packed = random_packed(n, k, 1, KINDS[0], generator)
    x, bias = (torch.randn(*s, generator=generator) for s in ((3, k), (n,)))
    with native.capped(isa), poisoned():
        plain, real = (ops.linear_real(x, packed, b) for b in (None, bias.to(type_)))
        codes, scales = ops.quantize_rows(x, 8)
        product, whole = (
            ops.linear_codes(codes, scales, packed, b, torch.float32)
            for b in (None, bias.to(type_))
        )
    for got, base in ((real, plain), (whole, product)):
        # another kernel may serve this type, whose sums of thousands are rounded in another order
        assert torch.allclose(got - base, bias.to(type_).float().expand(3, n), atol=1e-3)


@needs_library
def test_arguments_that_do_not_fit_are_refused() -> None:
    packed = random_packed(5, 8, 1, (8, False, False), torch.Generator().manual_seed(7))
    with pytest.raises(ValueError, match="9 features"):
        ops.linear_real(torch.randn(2, 9), packed, None)
    with pytest.raises(ValueError, match="bias"):
        ops.linear_real(torch.randn(2, 8), packed, torch.randn(4))
    codes = torch.ones(2, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="scales"):
        ops.linear_codes(codes, torch.ones(1, 1), packed, None, torch.float32)
    with pytest.raises(ValueError, match="floating"):
        ops.linear_real(torch.ones(2, 8, dtype=torch.int32), packed, None)
