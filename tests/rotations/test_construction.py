"""Which widths have which transforms, and that Hadamard matrices are Hadamard matrices."""

import math
import time

import pytest
import torch

from qpass.errors import BadInput
from qpass.rotations import ROTATIONS, Key
from qpass.rotations.apply import apply
from qpass.rotations.construction import construct, construct_exact
from qpass.rotations.finite_field import jacobsthal, prime_power
from qpass.rotations.flat import flattest
from qpass.rotations.hadamard_orders import hadamard_recipe

PALEY_AND_KRONECKER = 372  # of the multiples of 4 up to 2048, without Williamson's
HARTLEY = math.sqrt(2) + 1e-12


def test_how_many_orders_are_reached() -> None:
    reached = [n for n in range(4, 2049, 4) if hadamard_recipe(n) is not None]
    assert len(reached) > PALEY_AND_KRONECKER
    assert {92, 116, 172, 184, 232} <= {*reached}


@pytest.mark.parametrize("order", [n for n in (1, 2, *range(4, 305, 4)) if hadamard_recipe(n)])
def test_a_hadamard_matrix_is_one(order: int) -> None:
    recipe = hadamard_recipe(order)
    assert recipe is not None
    H = recipe.build().double()
    assert H.shape == (order, order)
    assert (H.abs() == 1).all()
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_that_cannot_exist() -> None:
    assert all(hadamard_recipe(n) is None for n in (-4, 0, 3, 6, 10, 18, 50, 97))


@pytest.mark.parametrize("q", [3, 5, 7, 9, 13, 25, 27, 49, 81, 121, 125])
def test_jacobsthal_matrices_have_their_two_identities(q: int) -> None:
    Q = jacobsthal(q).double()
    assert torch.equal(Q @ Q.T, q * torch.eye(q, dtype=torch.float64) - 1)
    assert torch.equal(Q.sum(1), torch.zeros(q, dtype=torch.float64))
    assert torch.equal(Q.T, Q if q % 4 == 1 else -Q)


def test_prime_powers() -> None:
    found = [q for q in range(-1, 33) if prime_power(q)]
    assert found == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31, 32]
    assert prime_power(343) == (7, 3)


@pytest.mark.parametrize(
    ("n", "m", "power", "hadamard"),
    [
        (1, 1, 1, True),
        (2, 1, 2, True),
        (3, 3, 1, False),
        (7, 7, 1, False),
        (97, 97, 1, False),
        (576, 36, 16, True),
        (1536, 12, 128, True),
        (8960, 35, 256, False),
        (11008, 43, 256, False),
        (13696, 107, 128, False),
        (18944, 37, 512, False),
        (49152, 12, 4096, True),
        (32768, 1, 32768, True),
        (10944, 171, 64, False),
        (29568, 231, 128, False),
    ],
)
def test_the_choice_for_a_width(n: int, m: int, power: int, hadamard: bool) -> None:
    construction = construct(n)
    assert (construction.m, construction.power) == (m, power)
    assert construction.hadamard is hadamard
    assert construction.why()


@pytest.mark.parametrize(
    ("n", "m"), [(576, 36), (8960, 140), (10944, 684), (11008, 172), (18944, 148), (29568, 924)]
)
def test_the_exact_choice_for_a_width(n: int, m: int) -> None:
    construction = construct_exact(n)
    assert construction is not None
    assert (construction.m, construction.power) == (m, n // m)
    H = construction.factor() * math.sqrt(m)
    assert (H.abs() == 1).all()
    assert torch.equal(H @ H.T, m * torch.eye(m, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 13696, 27392])
def test_widths_without_a_known_hadamard_matrix(n: int) -> None:
    assert construct_exact(n) is None
    why = ROTATIONS["hadamard_exact"].supports(n)
    assert why == f"no Hadamard matrix of order {n} is known here"
    with pytest.raises(BadInput, match="use 'hadamard'"):
        ROTATIONS["hadamard_exact"].fast(n, Key("a", 0))


@pytest.mark.parametrize("n", range(1, 131))
def test_entries_are_as_flat_as_claimed(n: int) -> None:
    construction = construct(n)
    factor = construction.factor()
    assert construction.m * construction.power == n
    largest = factor.abs() * math.sqrt(construction.m)
    if construction.hadamard:
        torch.testing.assert_close(largest, torch.ones_like(factor))
    else:
        assert largest.max() <= HARTLEY


@pytest.mark.parametrize("m", [3, 7, 11, 23, 35, 37, 43, 97, 107, 171, 231])
def test_a_core_or_jacobsthal_factor_is_nearly_flat(m: int) -> None:
    assert flattest(m).coherence <= 1 + 1 / math.sqrt(m)


@pytest.mark.parametrize("n", [8960, 10944, 13696, 18944, 29568, 49152])
def test_wide_transforms_are_cheap_and_keep_lengths(n: int) -> None:
    start = time.process_time()
    fast = ROTATIONS["hadamard"].fast(n, Key("wide", 0))
    assert time.process_time() - start < 5  # an n x n matrix would take far longer
    assert fast is not None
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = apply(fast, x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[0] @ y[1], x[0] @ x[1])
    spike = torch.zeros(n, dtype=torch.float64)
    spike[n // 3] = 1
    assert apply(fast, spike).abs().max() * math.sqrt(n) <= HARTLEY


def test_a_huge_prime_has_no_fast_form() -> None:
    assert ROTATIONS["hadamard"].supports(29989) is None
    assert ROTATIONS["hadamard"].fast(29989, Key("wide", 0)) is None
