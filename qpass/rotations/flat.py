"""Which orthogonal matrix of an order without a Hadamard matrix has the smallest largest entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rotations.finite_field import jacobsthal, prime_power
from qpass.rotations.hadamard_orders import hadamard_recipe


@final
@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """An orthonormal `[m, m]` in float64; no entry exceeds `coherence / sqrt(m)`."""

    matrix: Tensor
    why: str

    @property
    def coherence(self) -> float:
        """1 for a Hadamard matrix, sqrt(m) for the identity."""
        return self.matrix.abs().max().item() * math.sqrt(len(self.matrix))


def flattest(m: int) -> Flat:
    """The candidate with the smallest coherence; Hartley exists for every m and has sqrt(2)."""
    candidates = [Flat(_hartley(m), f"Hartley of order {m}")]
    if (larger := hadamard_recipe(m + 1)) is not None:
        why = f"core of the Hadamard matrix of order {m + 1} ({larger.why})"
        candidates.append(Flat(_core(larger.build()), why))
    if m % 4 == 1 and prime_power(m) is not None:
        candidates.append(Flat(_jacobsthal(m), f"Jacobsthal matrix over GF({m})"))
    return min(candidates, key=lambda flat: flat.coherence)


def _hartley(m: int) -> Tensor:
    """`cos + sin` of every frequency (Bracewell, Discrete Hartley transform, 1983)."""
    steps = torch.arange(m)
    # the product is reduced as an integer: a large angle would cost digits
    angle = (steps[:, None] * steps[None, :] % m).double() * (2 * math.pi / m)
    return (angle.cos() + angle.sin()) / math.sqrt(m)


def _core(H: Tensor) -> Tensor:
    """The Hadamard matrix without its first row and column, with a constant that repairs it."""
    m = len(H) - 1
    ones_first = H * H[:1] * (H[:, :1] * H[0, 0])
    shift = (1 - math.sqrt(m + 1)) / m
    return (ones_first[1:, 1:].double() + shift) / math.sqrt(m + 1)


def _jacobsthal(q: int) -> Tensor:
    return (jacobsthal(q).double() + 1 / math.sqrt(q)) / math.sqrt(q)
