"""Do all compiled paths give the same bits where their arithmetic is integer?

Products of codes, look-ups and quantizing without a rotation are defined to the last bit: sums of
integers are exact, and what is float32 is done in one order. `test_linear.py` and `test_rows.py`
hold each path to the specification; here paths meet each other, at every small size.
"""

# M rows, N out_features, K in_features

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import qpass.ops as ops
from qpass.runtime import native
from qpass.runtime.native import Isa
from tests.kernels.cases import KINDS, paths, poisoned, random_packed

pytestmark = pytest.mark.skipif(not paths(), reason=str(native.load().why))

OTHERS = [isa for isa in paths() if isa is not Isa.PORTABLE]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_K, LARGEST_N, LARGEST_M = 130, 70, 70
# numbers around those at which kernels change: lines, blocks, tiles, rows taken together
SOME_K = (1, 2, 3, 4, 5, 7, 8, 9, 15, 31, 32, 33, 63, 64, 65, 66, 96, 127, 128, 129, 130)
SOME_N = (1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 70)
SOME_M = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 70)


def off_by_one(tensor: Tensor) -> Tensor:
    """The same values, one element behind an aligned address."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor)
    assert moved.storage_offset() == 1
    return moved


def strided(tensor: Tensor) -> Tensor:
    """The same values, with others between them."""
    spread = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77, dtype=tensor.dtype)
    spread[..., ::2] = tensor
    return spread[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    """The same values, column by column."""
    return tensor.mT.contiguous().mT


LAYOUTS: list[Callable[[Tensor], Tensor]] = [lambda t: t, off_by_one, strided, transposed]


def moved(packed: ops.PackedLinear, layout: Callable[[Tensor], Tensor]) -> ops.PackedLinear:
    """A weight whose tensors lie in memory as `layout` puts them."""
    parts = (packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets)
    lines, rows, scales, offsets = (None if t is None else layout(t) for t in parts)
    return ops.PackedLinear(
        lines, rows, scales, offsets, packed.bits, packed.in_features, packed.out_features
    )


def groupings(k: int) -> list[int]:
    """How many groups `k` columns may have: one, some, and one for each column."""
    return sorted({1, k, *(g for g in (2, 3, 4, 5) if k % g == 0)})


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))


class Products:
    """Calls of `linear.codes`, each on another kind of weight, dtype and layout than the last."""

    def __init__(self) -> None:
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)

    def compare(self, k: int, n: int, ms: tuple[int, ...]) -> None:
        turn = self.calls
        self.calls += 1
        generator = self.generator
        kind = KINDS[turn % len(KINDS)]
        groups = groupings(k)[turn // 5 % len(groupings(k))]
        dtype = DTYPES[turn % len(DTYPES)]
        plain = random_packed(n, k, groups, kind, generator)
        codes = torch.randint(-127, 128, (LARGEST_M, k), dtype=torch.int8, generator=generator)
        scales = torch.rand(LARGEST_M, 1, generator=generator) / 100
        bias = torch.randn(n, generator=generator) if turn % 2 else None
        with native.capped(Isa.PORTABLE), poisoned():
            want = ops.linear_codes(codes, scales, plain, bias, dtype)
        assert want.isfinite().all()
        layout = LAYOUTS[turn // 2 % len(LAYOUTS)]
        packed = moved(plain, LAYOUTS[turn // 3 % 3])
        for isa in OTHERS:
            with native.capped(isa):
                for m in ms:
                    x, s = layout(codes[:m]), layout(scales[:m])
                    got = ops.linear_codes(x, s, packed, bias, dtype)
                    assert same(got, want[:m]), (isa.name, m, n, k, groups, kind, dtype)


def test_products_of_codes() -> None:
    products = Products()
    with poisoned():
        for i, k in enumerate(SOME_K):
            for j, n in enumerate(SOME_N):
                # a quarter of the rows: with the many other sizes, all are met
                products.compare(k, n, SOME_M[(i + j) % 4 :: 4])
    assert products.calls == len(SOME_K) * len(SOME_N)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, LARGEST_K + 1, 10))
def test_products_of_codes_at_every_size(first: int) -> None:
    products = Products()
    products.calls = first
    for k in range(first, min(first + 10, LARGEST_K + 1)):
        for n in range(1, LARGEST_N + 1):
            products.compare(k, n, tuple(range(LARGEST_M + 1)))


def rows(k: int, m: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows with ties, zeros, and magnitudes far apart."""
    x = torch.randn(m, k, generator=generator).to(dtype)
    if m > 2:
        x[1] = torch.arange(k) / 2
        x[2] = 0
    if m > 4:
        x[3] *= 1e-6
        x[4] = torch.nan
    return x


def row_cases(ks: tuple[int, ...], ms: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    for i, k in enumerate(ks):
        for j, m in enumerate(ms):
            yield i + j, k, m


def compare_rows(ks: tuple[int, ...], ms: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for turn, k, m in row_cases(ks, ms):
        dtype, bits = DTYPES[turn % 3], (8, 4, 2)[turn // 3 % 3]
        x = rows(k, m, dtype, generator)
        with native.capped(Isa.PORTABLE):
            want = ops.quantize_rows(x, bits)
        for isa in OTHERS:
            for layout in LAYOUTS:
                with native.capped(isa):
                    got = ops.quantize_rows(layout(x), bits)
                assert all(map(same, got, want)), (isa.name, m, k, dtype, bits)


def test_quantizing_rows() -> None:
    with poisoned():
        compare_rows(SOME_K, SOME_M[::3])


@pytest.mark.slow
def test_quantizing_rows_at_every_size() -> None:
    compare_rows(tuple(range(1, LARGEST_K + 1)), tuple(range(LARGEST_M + 1)))


def compare_tables(ks: tuple[int, ...], ms: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    v = 23
    for turn, k, m in row_cases(ks, ms):
        codes = torch.randint(-128, 128, (v, k), dtype=torch.int16, generator=generator)
        table, scales = codes.to(torch.int8), torch.rand(v, generator=generator)
        indices = torch.randint(0, v, (m,), generator=generator)
        dtype = DTYPES[turn % 3]
        with native.capped(Isa.PORTABLE):
            want = ops.embedding(indices, table, scales, dtype)
        for isa in OTHERS:
            for layout in LAYOUTS:
                parts = (
                    layout(indices[:, None])[:, 0],
                    layout(table),
                    layout(scales[:, None])[:, 0],
                )
                with native.capped(isa):
                    got = ops.embedding(*parts, dtype)
                assert same(got, want), (isa.name, m, k, dtype)


def test_looking_up() -> None:
    with poisoned():
        compare_tables(SOME_K, SOME_M[::4])


@pytest.mark.slow
def test_looking_up_at_every_size() -> None:
    compare_tables(tuple(range(1, LARGEST_K + 1)), tuple(range(LARGEST_M + 1)))
