"""Randomized Hadamard transforms: flat, cheap, and named by a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.errors import BadInput
from qpass.rotations.apply import dense
from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation, no_such_width
from qpass.rotations.construction import Construction, construct, construct_exact
from qpass.rotations.counter import signs
from qpass.rotations.group import Group

# a dense factor past this order costs more than the products that the transform serves
LARGEST_FAST_FACTOR = 1024


@final
@dataclass(frozen=True, slots=True)
class Hadamard(Rotation):
    """Random signs, then the matrix that `construct` finds for the width."""

    name: str
    construct: Callable[[int], Construction | None]
    group: Group = Group.ORTHOGONAL

    def supports(self, n: int) -> str | None:
        if (why := no_such_width(n)) is not None:
            return why
        return None if self.construct(n) else f"no Hadamard matrix of order {n} is known here"

    def matrix(self, n: int, key: Key) -> Tensor:
        return dense(_randomized(n, key, self._of(n)))

    def fast(self, n: int, key: Key) -> Fast | None:
        construction = self._of(n)
        if construction.m > LARGEST_FAST_FACTOR:
            return None
        return _randomized(n, key, construction)

    def _of(self, n: int) -> Construction:
        construction = self.construct(n)
        if construction is None:
            raise BadInput(f"rotation {self.name!r}: {self.supports(n)}; use 'hadamard'")
        return construction


def _randomized(n: int, key: Key, construction: Construction) -> Fast:
    return Fast(signs(key, n), construction.factor(), construction.power)


# every width: almost flat where a Hadamard matrix is unknown or its factor is expensive
ROTATIONS.add(Hadamard("hadamard", construct))
# entries of equal magnitude whatever the factor costs: for transforms that fold into weights
ROTATIONS.add(Hadamard("hadamard_exact", construct_exact))
