"""Whether the lift of any orthogonal matrix is orthogonal and fixes the all-ones vector."""

import pytest
import torch

from qpass.rotations import ROTATIONS, Key
from qpass.rotations.lift import lift

EXACT = 1e-13  # a few float64 roundings of numbers of magnitude 1


def haar(n: int, seed: int = 0) -> torch.Tensor:
    return ROTATIONS["haar"].matrix(n, Key("lift", seed))


def check(R: torch.Tensor) -> None:
    n = len(R)
    ones = torch.ones(n, dtype=R.dtype)
    assert (ones @ R - ones).abs().max() <= EXACT * n
    assert (R @ R.T - torch.eye(n, dtype=R.dtype)).abs().max() <= EXACT


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 97, 128])
@pytest.mark.parametrize("seed", range(4))
def test_a_lift_fixes_the_ones_and_is_orthogonal(n: int, seed: int) -> None:
    check(lift(haar(n, seed)))


@pytest.mark.parametrize("n", [3, 7, 16, 97])
def test_a_lift_is_the_reflection_of_its_definition(n: int) -> None:
    Q = haar(n)
    u = torch.full((1, n), n**-0.5, dtype=torch.float64)
    v = u @ Q - u
    want = Q @ (torch.eye(n, dtype=torch.float64) - 2 * v.T @ v / (v @ v.T))
    torch.testing.assert_close(lift(Q), want, rtol=0, atol=EXACT)


def test_what_fixes_the_ones_already_stays() -> None:
    P = torch.eye(7, dtype=torch.float64)[torch.tensor([3, 1, 0, 6, 5, 4, 2])]
    torch.testing.assert_close(lift(P), P, rtol=0, atol=EXACT)
    R = lift(haar(50))
    torch.testing.assert_close(lift(R), R, rtol=0, atol=EXACT)


@pytest.mark.parametrize("angle", [1e-1, 1e-4, 1e-8, 1e-12, 3.1])
def test_a_lift_is_exact_however_near_the_ones_are(angle: float) -> None:
    n = 24
    R = lift(haar(n))
    turn = torch.eye(n, dtype=torch.float64)
    c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
    turn[0, 0] = turn[1, 1] = c
    turn[0, 1], turn[1, 0] = s, -s
    check(lift(R @ turn))


def test_the_negative_of_the_identity_lifts() -> None:
    check(lift(-torch.eye(9, dtype=torch.float64)))
