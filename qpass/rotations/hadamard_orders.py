"""For which orders a Hadamard matrix can be built, and how."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rotations.finite_field import jacobsthal, prime_power
from qpass.rotations.williamson import has_williamson, williamson

_TWO = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """A way to build the Hadamard matrix of one order: `[order, order]` of +1 and -1 in int8."""

    order: int
    why: str
    build: Callable[[], Tensor]


@functools.cache
def hadamard_recipe(order: int) -> Recipe | None:
    """The first construction that reaches `order`, or None where none of them does."""
    if order < 1 or (order > 2 and order % 4):
        return None
    for construction in (_sylvester, _paley_one, _paley_two, _williamson, _kronecker):
        if (recipe := construction(order)) is not None:
            return recipe
    return None


def sylvester(order: int) -> Tensor:
    """Sylvester's symmetric matrix of +1 and -1 for a power of two, in int8."""
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while len(matrix) < order:
        matrix = torch.kron(_TWO, matrix)
    return matrix


def conference(q: int) -> Tensor:
    """`C` of order q + 1, zero on the diagonal and +1 or -1 off it, with `C C.T == q I`, in int8.

    Symmetric where q is 1 modulo 4, skew where it is 3 (Paley, On orthogonal matrices, 1933).
    """
    C = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    C[0, 1:] = 1
    C[1:, 0] = 1 if q % 4 == 1 else -1
    C[1:, 1:] = jacobsthal(q)
    return C


def _sylvester(order: int) -> Recipe | None:
    if order & (order - 1):
        return None
    return Recipe(order, "Sylvester", lambda: sylvester(order))


def _paley_one(order: int) -> Recipe | None:
    q = order - 1
    if q % 4 != 3 or prime_power(q) is None:
        return None
    return Recipe(
        order, f"Paley I over GF({q})", lambda: conference(q) + torch.eye(order, dtype=torch.int8)
    )


def _paley_two(order: int) -> Recipe | None:
    q = order // 2 - 1
    if q % 4 != 1 or prime_power(q) is None:
        return None
    return Recipe(order, f"Paley II over GF({q})", lambda: _doubled(conference(q)))


def _doubled(C: Tensor) -> Tensor:
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(C, _TWO) + torch.kron(torch.eye(len(C), dtype=torch.int8), diagonal)


def _williamson(order: int) -> Recipe | None:
    if not has_williamson(order):
        return None
    return Recipe(order, f"Williamson of order {order}", lambda: williamson(order))


def _kronecker(order: int) -> Recipe | None:
    for left in (2, *range(4, int(order**0.5) + 1, 4)):
        if order % left:
            continue
        a, b = hadamard_recipe(left), hadamard_recipe(order // left)
        if a is not None and b is not None:
            return _product(a, b)
    return None


def _product(a: Recipe, b: Recipe) -> Recipe:
    why = f"order {a.order} ({a.why}) times order {b.order} ({b.why})"
    return Recipe(a.order * b.order, why, lambda: torch.kron(a.build(), b.build()))
