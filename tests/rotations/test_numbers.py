"""Elements by their numbers: told apart by content, and refused where they are none of a kind."""

import copy
import json

import pytest
import torch

from qpass.errors import BadInput
from qpass.rotations import Element, Group, Key, sample
from qpass.rotations.numbers import KINDS
from qpass.rotations.transform import Transform

HEADS, N = 3, 8
CLOSE = 1e-12


def numbers(kind: str, seed: int = 0) -> torch.Tensor:
    keys = [Key(f"{kind}/{h}", seed) for h in range(HEADS)]
    if kind == "diagonal":
        return torch.stack([sample(Group.DIAGONAL, N, key).diagonal() for key in keys])
    if kind == "permutation":
        return torch.stack([sample(Group.PERMUTATION, N, key).argmax(0) for key in keys])
    group = Group.ORTHOGONAL if kind == "orthogonal" else Group.GENERAL
    return torch.stack([sample(group, N, key) for key in keys])


def values() -> torch.Tensor:
    return torch.randn(4, HEADS, N, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_turn_is_the_product_with_the_matrix(kind: str) -> None:
    element, x = Element.of(kind, numbers(kind)), values()
    T = element.matrix()
    dual = torch.linalg.inv(T).mT
    for given, power in ((T, 1), (dual, -1)):
        want = torch.einsum("rhn,hnm->rhm", x, given)
        got = element.turn(x, power=power)
        torch.testing.assert_close(got, want, rtol=CLOSE, atol=CLOSE)
        back = element.turn(got, inverse=True, power=power)
        torch.testing.assert_close(back, x, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_one_matrix_serves_every_head(kind: str) -> None:
    single = numbers(kind)[:1]
    one, each = Element.of(kind, single), Element.of(kind, single.expand(HEADS, *single.shape[1:]))
    for power in (1, -1):
        want = each.turn(values(), power=power)
        torch.testing.assert_close(one.turn(values(), power=power), want, rtol=0, atol=CLOSE)


def test_scales_take_any_power() -> None:
    scales = numbers("diagonal").abs()
    got = Element.of("diagonal", scales).turn(values(), power=2)
    torch.testing.assert_close(got, values() * scales**2, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_numbers_are_equal_elements(kind: str) -> None:
    given = numbers(kind)
    one, same, other = (Element.of(kind, x) for x in (given, given.clone(), numbers(kind, 1)))
    assert one == same == copy.deepcopy(one)
    assert len({one, same, other}) == 2
    # a name is the element without its numbers, and is filled only by its own
    name = Element.read(json.loads(json.dumps(one.table())))
    assert name == one
    assert torch.equal(name.filled(given).given(), one.given())
    with pytest.raises(BadInput, match="altered"):
        name.filled(numbers(kind, 1))
    with pytest.raises(BadInput, match="are not here"):
        name.turn(values())


def test_numbers_are_kept_apart_from_their_maker() -> None:
    given = numbers("orthogonal")
    element = Element.of("orthogonal", given)
    given.zero_()
    assert element.given().abs().max() > 0


def test_groups() -> None:
    scales = numbers("diagonal")
    lifted = Transform("hadamard", N, heads=HEADS, lifted=True).matrix()
    found = {
        Element.of("orthogonal", numbers("orthogonal")).group: Group.ORTHOGONAL,
        Element.of("orthogonal", lifted, lifted=True).group: Group.ORTHOGONAL_ONES,
        Element.of("diagonal", scales).group: Group.DIAGONAL,
        Element.of("diagonal", scales.abs()).group: Group.POSITIVE_DIAGONAL,
        Element.of("diagonal", scales.sign()).group: Group.SIGNS,
        Element.of("permutation", numbers("permutation")).group: Group.PERMUTATION,
        Element.of("general", numbers("general")).group: Group.GENERAL,
    }
    assert all(got is want for got, want in found.items())


EYE = torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "given", "why"),
    [
        ("orthogonal", EYE * 1.001, "not orthogonal"),
        ("orthogonal", EYE.float().fill_diagonal_(float("nan")), "finite"),
        ("orthogonal", EYE[:, :4], "cannot have the shape"),
        ("orthogonal", torch.ones(N), "3 axes"),
        ("orthogonal", EYE.to(torch.complex64), "complex"),
        ("diagonal", torch.tensor([1.0, 0.0]), "zero"),
        ("diagonal", torch.tensor([1.0, 1e-30]).double(), "differ by a factor"),
        ("diagonal", torch.ones(0), "cannot have the shape"),
        ("permutation", torch.tensor([0, 0, 1]), "no permutation"),
        ("permutation", torch.tensor([0.0, 1.0]), "int64"),
        ("general", torch.ones(N, N), "condition"),
        ("general", torch.zeros(N, N), "condition"),
        ("orthogonl", EYE, "orthogonl"),
    ],
)
def test_what_is_none_of_a_kind(kind: str, given: torch.Tensor, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        Element.of(kind, given)


def test_a_lifted_matrix_fixes_the_ones() -> None:
    with pytest.raises(BadInput, match="does not fix the all-ones"):
        Element.of("orthogonal", numbers("orthogonal"), lifted=True)
    with pytest.raises(BadInput, match="does not fix the all-ones"):
        Element.of("diagonal", numbers("diagonal"), lifted=True)
