"""What a rotation is: a name, a group, and a matrix for every width it supports.

Convention, stated once: values are row vectors and change as `x -> x @ T`. A *writer* (the weight,
bias or table that produces a value) multiplies its axis by `T`; a *reader* by the inverse transpose
of `T`. For an orthogonal `R` the two coincide: both multiply the site's axis by `R`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.registry import Registry
from qpass.rotations.group import Group


@final
@dataclass(frozen=True, slots=True)
class Key:
    """Where random numbers come from: equal keys give equal numbers on every machine."""

    name: str
    seed: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Fast:
    """`x -> ((x * signs) in blocks) @ (factor (x) H)`, with H the orthonormal Sylvester matrix.

    `signs` is `[n]`, `factor` `[m, m]` and orthonormal in rotations, `power` the order of H (a
    power of two), and `n` a multiple of the block `m * power`: each block is read as `[m, power]`.
    """

    signs: Tensor
    factor: Tensor
    power: int


class Rotation(abc.ABC):
    """A family of orthogonal matrices, one for each width and key."""

    name: str
    group: Group

    @abc.abstractmethod
    def supports(self, n: int) -> str | None:
        """Why width `n` cannot be built, or None when it can."""

    @abc.abstractmethod
    def matrix(self, n: int, key: Key) -> Tensor:
        """An `n x n` float64 matrix `R` with `R @ R.T == I`."""

    @abc.abstractmethod
    def fast(self, n: int, key: Key) -> Fast | None:
        """The same map as a fast transform in float64, or None when there is none."""


def no_such_width(n: int) -> str | None:
    """Why no matrix has width `n` at all, or None."""
    return None if n > 0 else f"a width is at least 1, got {n}"


ROTATIONS: Registry[Rotation] = Registry("rotation", "qpass.rotations")
