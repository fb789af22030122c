"""Randomized Hadamard transforms of any width: flat, cheap, and named by a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.rotations.apply import dense
from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation, no_such_width
from qpass.rotations.construction import construct
from qpass.rotations.counter import signs
from qpass.rotations.group import Group

# a dense factor past this order costs more than the products that the transform serves
LARGEST_FAST_FACTOR = 1024


@final
@dataclass(frozen=True, slots=True)
class Hadamard(Rotation):
    """Random signs, then a Hadamard matrix or, where none is known, an almost flat one."""

    name: str = "hadamard"
    group: Group = Group.ORTHOGONAL

    def supports(self, n: int) -> str | None:
        return no_such_width(n)

    def matrix(self, n: int, key: Key) -> Tensor:
        return dense(_randomized(n, key))

    def fast(self, n: int, key: Key) -> Fast | None:
        if construct(n).m > LARGEST_FAST_FACTOR:
            return None
        return _randomized(n, key)


def _randomized(n: int, key: Key) -> Fast:
    construction = construct(n)
    return Fast(signs(key, n), construction.factor(), construction.power)


ROTATIONS.add(Hadamard())
