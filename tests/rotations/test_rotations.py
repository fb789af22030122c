"""Whether every registered rotation is what its group says, at every width it supports."""

import pytest
import torch

from qpass.errors import BadInput, UnknownName
from qpass.rotations import ROTATIONS, Key, Rotation, Transform
from qpass.rotations.apply import apply
from qpass.rotations.elements import contains

ORTHOGONAL = 1e-12  # float64 rounding of products of a few hundred terms
FAST = 1e-13
WIDTHS = (1, 2, 3, 5, 6, 7, 12, 16, 21, 27, 28, 36, 48, 50, 64, 92, 97, 100, 128, 140, 192, 272)

each_rotation = pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: r.name)
each_supported_width = pytest.mark.parametrize(
    ("rotation", "n"),
    [
        pytest.param(rotation, n, id=f"{rotation.name}-{n}")
        for rotation in ROTATIONS
        for n in WIDTHS
        if rotation.supports(n) is None
    ],
)


@each_supported_width
def test_a_matrix_is_orthogonal_and_in_its_group(rotation: Rotation, n: int) -> None:
    R = rotation.matrix(n, Key("test", 1))
    assert R.shape == (n, n)
    assert R.dtype == torch.float64
    assert (R @ R.T - torch.eye(n, dtype=R.dtype)).abs().max() <= ORTHOGONAL
    assert contains(rotation.group, R)


@each_supported_width
def test_the_fast_form_equals_the_matrix(rotation: Rotation, n: int) -> None:
    key = Key("test", 2)
    if (fast := rotation.fast(n, key)) is None:
        assert rotation.name == "haar"
        return
    m = len(fast.factor)
    assert n % (m * fast.power) == 0
    assert fast.power & (fast.power - 1) == 0
    assert {*fast.signs.tolist()} <= {1.0, -1.0}
    R = rotation.matrix(n, key)
    torch.testing.assert_close(apply(fast, torch.eye(n).double()), R, rtol=0, atol=FAST)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(apply(fast, x), x @ R, rtol=0, atol=10 * FAST)


@each_rotation
def test_equal_keys_give_equal_matrices(rotation: Rotation) -> None:
    n = 256
    R = rotation.matrix(n, Key("a", 3))
    assert torch.equal(R, rotation.matrix(n, Key("a", 3)))
    if rotation.name == "identity":
        return
    assert not torch.equal(R, rotation.matrix(n, Key("a", 4)))
    assert not torch.equal(R, rotation.matrix(n, Key("b", 3)))


@each_rotation
def test_a_global_seed_changes_nothing(rotation: Rotation) -> None:
    torch.manual_seed(1)
    R = rotation.matrix(256, Key("a", 3))
    torch.manual_seed(2)
    assert torch.equal(R, rotation.matrix(256, Key("a", 3)))


@each_rotation
def test_no_rotation_has_a_width_below_one(rotation: Rotation) -> None:
    assert rotation.supports(0) == "a width is at least 1, got 0"
    assert rotation.supports(-4) is not None


def test_an_unsupported_width_is_refused_with_its_reason() -> None:
    with pytest.raises(BadInput, match="width 100 is not a multiple of the block 64"):
        Transform("block_hadamard_64", 100).matrix()
    with pytest.raises(BadInput, match="width 7 is odd"):
        Transform("block_hadamard", 7).fast()
    with pytest.raises(UnknownName, match="did you mean 'hadamard'"):
        Transform("hadamrad", 8).matrix()


def test_heads_of_a_transform_differ() -> None:
    first, second = Transform("hadamard", 24, heads=2).matrix()
    assert not torch.equal(first, second)


def test_a_lifted_transform_fixes_the_ones() -> None:
    R = Transform("hadamard", 36, heads=3, lifted=True).matrix()
    assert (R.sum(1) - 1).abs().max() <= ORTHOGONAL
    assert Transform("hadamard", 36, lifted=True).fast() is None


def test_a_transform_is_the_matrix_of_its_fast_form() -> None:
    transform = Transform("hadamard", 24, seed=5)
    fast = transform.fast()
    assert fast is not None
    eye = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(apply(fast, eye), transform.matrix()[0], rtol=0, atol=FAST)


def test_haar_has_no_preferred_sign() -> None:
    # plain QR fixes the signs of the diagonal, which uniform matrices do not
    matrices = [ROTATIONS["haar"].matrix(4, Key("haar", seed)) for seed in range(256)]
    diagonal = torch.stack([R.diagonal() for R in matrices])
    # an entry has variance 1/4; five standard errors
    assert diagonal.mean(0).abs().max() <= 5 * 0.5 / 16
    assert (diagonal.pow(2).mean(0) - 1 / 4).abs().max() <= 5 * 0.5 / 16


def test_blocks_do_not_mix() -> None:
    R = ROTATIONS["block_hadamard_64"].matrix(192, Key("a", 0))
    inside = torch.block_diag(*[torch.ones(64, 64)] * 3).bool()
    assert (R[~inside] == 0).all()
    torch.testing.assert_close(R[inside].abs(), torch.full_like(R[inside], 1 / 8))


def test_the_default_block_is_the_largest_power_of_two() -> None:
    fast = ROTATIONS["block_hadamard"].fast(192, Key("a", 0))
    assert fast is not None
    assert fast.power == 64
