"""Are changes of basis with a given factor what their matrices say, and undone exactly?"""

from __future__ import annotations

import pytest
import torch

from qpass.errors import BadInput
from qpass.rotations import Group, Key, Kronecker, sample

EXACT = 1e-12
SIZES = [(12, 3, 4), (12, 3, 1), (48, 6, 8), (20, 5, 2), (7, 7, 1)]


def given(width: int, order: int, power: int, seed: int = 0) -> Kronecker:
    factor = sample(Group.GENERAL, order, Key("factor", seed))
    return Kronecker.of(factor, width, power=power, seed=seed)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_agrees_with_its_matrix(size: tuple[int, int, int]) -> None:
    transform = given(*size)
    x = torch.randn(5, 1, size[0], dtype=torch.float64)
    T = transform.matrix()[0]
    for power, matrix in ((1, T), (-1, torch.linalg.inv(T).T)):
        made = transform.turn(x, power=power)
        torch.testing.assert_close(made, x @ matrix, rtol=EXACT, atol=EXACT)
        undone = transform.turn(made, inverse=True, power=power)
        torch.testing.assert_close(undone, x, rtol=EXACT, atol=EXACT)


def test_what_is_read_and_multiplied_stays() -> None:
    # (x T) (w T^-T)^T = x w^T
    transform = given(48, 12, 4)
    x, w = (torch.randn(3, 1, 48, dtype=torch.float64) for _ in "xw")
    got = transform.turn(x)[:, 0] @ transform.turn(w, power=-1)[:, 0].T
    torch.testing.assert_close(got, x[:, 0] @ w[:, 0].T, rtol=EXACT, atol=EXACT)


def test_it_is_told_apart_by_what_it_is() -> None:
    first = given(48, 6, 8)
    assert first == given(48, 6, 8)
    others = [given(48, 6, 8, seed=1), given(48, 6, 4), given(96, 6, 8)]
    assert len({first.digest, *(o.digest for o in others)}) == 4
    name = Kronecker.read(first.table())
    assert name == first
    assert torch.equal(name.filled(first.given()).given(), first.given())
    with pytest.raises(BadInput, match="altered"):
        name.filled(2 * first.given())
    with pytest.raises(BadInput, match="are not here"):
        name.matrix()


@pytest.mark.parametrize(
    ("factor", "width", "power", "why"),
    [
        (torch.ones(3, 3), 12, 4, "condition"),
        (torch.full((2, 2), torch.nan), 4, 2, "condition"),
        (torch.eye(3), 12, 3, "a power of two"),
        (torch.eye(3), 10, 1, "no multiple of the block 3 x 1"),
        (torch.ones(2, 3), 6, 1, "a square matrix"),
        (torch.ones(1, 1), 8, 8, "mixes nothing"),
    ],
)
def test_what_cannot_be_undone_is_refused(factor, width, power, why) -> None:
    with pytest.raises(BadInput, match=why):
        Kronecker.of(factor, width, power=power)


def test_damaged_names_are_refused() -> None:
    table = given(12, 3, 4).table()
    for key, value in (("order", 5), ("power", 3), ("width", "12"), ("digest", "ab"), ("seed", -1)):
        with pytest.raises(BadInput, match=r"width 12 is no multiple|power of two|" + key):
            Kronecker.read({**table, key: value})
    with pytest.raises(BadInput, match="a table of"):
        Kronecker.read({"order": 3})
