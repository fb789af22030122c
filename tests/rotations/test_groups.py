"""Whether the groups form the lattice they claim, judged by random elements."""

import itertools

import pytest
import torch

from qpass.errors import BadInput
from qpass.rotations import Group, Key
from qpass.rotations.elements import contains, sample

N = 8
PAIRS = list(itertools.product(Group, Group))


def element(group: Group, seed: int = 0, n: int = N) -> torch.Tensor:
    return sample(group, n, Key("element", seed))


@pytest.mark.parametrize(("small", "large"), PAIRS, ids=lambda g: g.name)
def test_the_order_is_what_random_elements_say(small: Group, large: Group) -> None:
    assert contains(large, element(small)) == (small <= large)


@pytest.mark.parametrize("group", Group, ids=lambda g: g.name)
def test_a_group_is_closed(group: Group) -> None:
    a, b = element(group, 1), element(group, 2)
    assert contains(group, a @ b)
    assert contains(group, torch.linalg.inv(a))
    assert contains(group, torch.eye(N, dtype=torch.float64))


@pytest.mark.parametrize("group", Group, ids=lambda g: g.name)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_elements_of_odd_and_small_widths(group: Group, n: int) -> None:
    planes = group in (Group.PLANE_ROTATIONS, Group.PLANE_SCALES, Group.ROPE_PLANES)
    if planes and n % 2:
        with pytest.raises(BadInput, match="even width"):
            element(group, n=n)
        assert not contains(group, torch.eye(n, dtype=torch.float64))
        return
    matrix = element(group, n=n)
    assert matrix.shape == (n, n)
    assert matrix.dtype == torch.float64
    assert contains(group, matrix)


def test_no_group_has_a_singular_or_undefined_matrix() -> None:
    for group in Group:
        assert not contains(group, torch.zeros(N, N, dtype=torch.float64))
        assert not contains(group, torch.full((N, N), float("nan"), dtype=torch.float64))


def test_the_order_is_a_partial_order() -> None:
    for a, b in PAIRS:
        assert a <= a
        assert (a is b) == (a <= b and b <= a)
        assert (a < b) == (a <= b and a is not b)
        assert (a >= b) == (b <= a)
        assert all(a <= c for c in Group if a <= b and b <= c)
        assert Group.IDENTITY <= a <= Group.GENERAL


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda g: g.name)
def test_a_meet_is_the_largest_group_in_both(a: Group, b: Group) -> None:
    meet = a & b
    assert meet is b & a
    assert meet <= a
    assert meet <= b
    assert all(c <= meet for c in Group if c <= a and c <= b)


def test_named_orders_and_meets() -> None:
    assert Group.PERMUTATION < Group.ORTHOGONAL_ONES < Group.ORTHOGONAL < Group.GENERAL
    assert Group.ORTHOGONAL & Group.DIAGONAL is Group.SIGNS
    assert Group.ORTHOGONAL & Group.ROPE_PLANES is Group.PLANE_ROTATIONS
    assert Group.DIAGONAL & Group.ROPE_PLANES is Group.PLANE_SCALES
    assert Group.PERMUTATION & Group.SIGNS is Group.IDENTITY
    assert Group.ORTHOGONAL_ONES & Group.SIGNS is Group.IDENTITY


def test_rotary_planes_pair_the_halves() -> None:
    M = element(Group.PLANE_ROTATIONS)
    half = N // 2
    pattern = torch.eye(half).repeat(2, 2).bool()
    assert (M[~pattern] == 0).all()
    assert (M[pattern] != 0).all()
    assert torch.equal(M[:half, half:], -M[half:, :half])
