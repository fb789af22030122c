"""Which factor and which power of two make up the Hadamard-like transform of a width."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.rotations.flat import flattest
from qpass.rotations.hadamard_orders import hadamard_recipe

# the factor is applied densely, m multiplications for each value: past this order an almost flat
# factor of a quarter of the order is the better bargain (the README has the numbers)
LARGEST_CHEAP_HADAMARD = 64


@final
@dataclass(frozen=True, slots=True)
class Construction:
    """`n == m * power`: an orthonormal factor of order m times Sylvester's matrix of `power`.

    `hadamard` says whether every entry of the product is `+-1 / sqrt(n)`.
    """

    m: int
    power: int
    hadamard: bool

    def factor(self) -> Tensor:
        """`[m, m]` orthonormal in float64; shared, so never written to."""
        return _factor(self.m, self.hadamard)[0]

    def why(self) -> str:
        """What the factor is."""
        return _factor(self.m, self.hadamard)[1]


def construct(n: int) -> Construction:
    """The smallest Hadamard factor for width n where it is cheap, else the flattest odd part."""
    exact = construct_exact(n)
    if exact is not None and exact.m <= LARGEST_CHEAP_HADAMARD:
        return exact
    odd = _odd_part(n)
    return Construction(odd, n // odd, hadamard=False)


def construct_exact(n: int) -> Construction | None:
    """The smallest Hadamard factor for width n, or None where no Hadamard matrix is known."""
    m = _odd_part(n)
    while n % m == 0:
        if hadamard_recipe(m) is not None:
            return Construction(m, n // m, hadamard=True)
        m *= 2
    return None


def _odd_part(n: int) -> int:
    return n // (n & -n)


@functools.lru_cache(maxsize=32)
def _factor(m: int, hadamard: bool) -> tuple[Tensor, str]:
    recipe = hadamard_recipe(m) if hadamard else None
    if recipe is not None:
        return recipe.build().double() / math.sqrt(m), recipe.why
    flat = flattest(m)
    return flat.matrix, flat.why
