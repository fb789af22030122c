"""Does every compiled path make the codes a product reads as the definitions say?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qpass.ops as ops
from qpass.ops.fused import norm
from qpass.ops.library import specification
from qpass.runtime import native
from qpass.runtime.native import Isa
from tests.kernels.cases import KINDS, paths, poisoned, random_packed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# how far a step may round differently: the sums of a norm run in another order, and exp is another
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
N = 20

pytestmark = [
    pytest.mark.skipif(not paths(), reason=str(native.load().why)),
    pytest.mark.parametrize("isa", paths(), ids=lambda isa: isa.name),
]


class Case:
    """A random product of `n` columns, with or without a transform, and rows for it."""

    def __init__(self, n: int, dtype: torch.dtype, *, turned: bool, kind: int = 3) -> None:
        self.generator = torch.Generator().manual_seed(n)
        self.n, self.dtype = n, dtype
        packed = random_packed(N, n, 1, KINDS[kind], self.generator)
        power = n & -n
        signs = torch.randint(0, 2, (n,), generator=self.generator).float() * 2 - 1
        order = n // power
        random = torch.randn(order, order, generator=self.generator)
        factor = torch.linalg.qr(random).Q.contiguous()
        turn = (signs, factor, power) if turned else (None, None, 1)
        self.product = (
            8, *turn, packed.weight, packed.row_scales, packed.group_scales, packed.group_offsets,
            None, packed.bits, n, N,
        )  # fmt: skip
        self.weight = packed
        self.signs, self.factor, self.power = turn

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def check(self, got: Tensor, front: Tensor) -> None:
        """`got` is the product of codes of `front`, computed in float64, within a step of each."""
        assert got.dtype is self.dtype
        x = front.double()
        if self.signs is not None:
            x = specification("hadamard")(x, self.signs, self.factor, self.power)
        codes, scales = specification("quantize_rows")(x, 8)
        w = specification("linear.real")(torch.eye(self.n).double(), *self.product[4:]).T
        want = codes.double() * scales.double() @ w.T
        rounding = STEP.get(self.dtype, 2.0**-20)
        # what is rounded differs in its last bits, so a code on an edge may fall to the other side
        largest = x.abs().amax(-1, keepdim=True)
        wrong = (x.abs() + largest) * rounding + scales * (1e-3 + 64 * rounding)
        limit = wrong @ w.abs().T + want.abs() * 2 * rounding + scales.double() * w.abs().amax() * 2
        assert ((got.double() - want).abs() <= limit).all()


@pytest.mark.parametrize("n", [1, 7, 16, 33, 96, 100, 576])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_alone_are_exact(isa: Isa, n: int, turned: bool, dtype: torch.dtype) -> None:
    case = Case(n, dtype, turned=turned)
    # a view of wider rows is read where it lies
    x = case.random(3, 2, n + 5)[..., 2 : n + 2]
    with native.capped(isa), poisoned():
        got = torch.ops.qpass.linear_rows(x, *case.product)
        codes, scales = ops.quantize_rows(x, 8, case.signs, case.factor, case.power)
        want = ops.linear_codes(codes, scales, case.weight, None, dtype)
    assert torch.equal(got, want)


@pytest.mark.parametrize("n", [2, 7, 16, 33, 96, 576])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
def test_norms(isa: Isa, n: int, turned: bool, dtype: torch.dtype, centred: bool) -> None:
    case = Case(n, dtype, turned=turned)
    x, added = case.random(5, n), case.random(5, n + 3)[:, :n]
    x[1] = 0
    added[1] = 0
    scale, shift = case.random(n), case.random(n)
    for gain, bias in ((scale, shift), (scale, None), (None, None)):
        kind = (gain, bias, centred, 1e-3)
        with native.capped(isa), poisoned():
            plain = torch.ops.qpass.linear_normed(x, *kind, *case.product)
            total, got = torch.ops.qpass.linear_added_normed(x, added, *kind, *case.product)
        assert torch.equal(total, x + added)
        for given, found in ((x, plain), (total, got)):
            arguments = (given, gain, bias, centred, 1e-3)
            case.check(found, norm(*arguments))


@pytest.mark.parametrize("n", [1, 7, 16, 33, 96, 576])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", list(ops.GATES))
def test_gates(isa: Isa, n: int, turned: bool, dtype: torch.dtype, gate: str) -> None:
    case = Case(n, dtype, turned=turned)
    both = case.random(5, 2 * n) * 3
    x, by = both[:, :n], both[:, n:]
    x[0, 0], x[1, 0] = 80, -80
    if n == 1:
        # of a negative value alone a gate leaves few digits in PyTorch
        x = x.abs()
    number = list(ops.GATES).index(gate)
    with native.capped(isa), poisoned():
        alone = torch.ops.qpass.linear_gated(x, None, number, *case.product)
        got = torch.ops.qpass.linear_gated(x, by, number, *case.product)
    gated = ops.GATES[gate](x.double()).to(dtype)
    case.check(alone, gated)
    case.check(got, gated * by)


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("m", [0, 1, 20])
def test_weights_and_rows(isa: Isa, kind: int, m: int) -> None:
    case = Case(48, torch.float32, turned=True, kind=kind)
    x, added = case.random(m, 48), case.random(m, 48)
    with native.capped(isa), poisoned():
        total, got = torch.ops.qpass.linear_added_normed(
            x, added, None, None, False, 1e-6, *case.product
        )
    assert torch.equal(total, x + added)
    assert got.shape == (m, N)
    case.check(got, norm(total, None, None, centred=False, eps=1e-6))


def test_a_row_that_is_not_finite_stays_so(isa: Isa) -> None:
    case = Case(32, torch.float32, turned=False)
    x = case.random(3, 32)
    x[1, 3] = torch.nan
    with native.capped(isa):
        normed = torch.ops.qpass.linear_normed(x, None, None, False, 1e-6, *case.product)
        for gate in range(len(ops.GATES)):
            gated = torch.ops.qpass.linear_gated(x, x, gate, *case.product)
            assert gated.isnan().any(-1).tolist() == [False, True, False]
    assert normed.isnan().any(-1).tolist() == [False, True, False]


def test_what_does_not_fit_is_refused(isa: Isa) -> None:
    case = Case(32, torch.float32, turned=False)
    x = case.random(3, 32)
    with native.capped(isa):
        with pytest.raises(ValueError, match="one shape and type"):
            torch.ops.qpass.linear_gated(x, x[:2], 0, *case.product)
        with pytest.raises(ValueError, match="no such gate"):
            torch.ops.qpass.linear_gated(x, x, 9, *case.product)
        with pytest.raises(ValueError, match="scale and shift"):
            torch.ops.qpass.linear_normed(x, x[0, :5], None, False, 1e-6, *case.product)
        with pytest.raises(ValueError, match="31 features"):
            torch.ops.qpass.linear_rows(x[:, :31], *case.product)
