"""A basis change by name: what plans and weights store instead of matrices."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.rotations.apply import apply, transform_blocks
from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation
from qpass.rotations.lift import lift, lift_terms


@final
@dataclass(frozen=True, slots=True)
class Transform:
    """One orthogonal matrix of a width, or `heads` different ones; equal names, equal matrices.

    `lifted` takes each matrix to the subgroup that fixes the all-ones vector.
    """

    rotation: str
    width: int
    seed: int = 0
    heads: int = 1
    lifted: bool = False

    def matrix(self) -> Tensor:
        """`[heads, width, width]` in float64; shared, so never written to."""
        return _matrix(self)

    def fast(self) -> Fast | None:
        """The fast form of a single unlifted transform, or None when there is none."""
        rotation = _checked(self)
        if self.heads != 1 or self.lifted:
            return None
        return rotation.fast(self.width, self.key(0))

    def lift(self) -> tuple[Tensor, Tensor]:
        """A and B `[k, width]` with `R = Q (I + A.T B)`, where Q is the same without the lift."""
        u = torch.full((self.width,), self.width**-0.5, dtype=torch.float64, device="cpu")
        return lift_terms(replace(self, lifted=False).turn(u.unsqueeze(0)).squeeze(0))

    def turn(self, x_rhn: Tensor, *, inverse: bool = False, power: int | Fraction = 1) -> Tensor:
        """`x @ R` on the last axis for each head's R, or `x @ R.T` if `inverse`, in float64.

        The `power` of a site is 1 or -1, which is the same for orthogonal matrices.

        `x` is `[..., h, width]`; a transform of one head serves every h. Runs the fast form where
        there is one, which for wide weights is tens of times cheaper than the matrix.
        """
        del power
        turned = [self._turn_head(x, h, inverse) for h, x in enumerate(self._by_head(x_rhn))]
        return turned[0] if self.heads == 1 else torch.stack(turned, dim=-2)

    def _by_head(self, x_rhn: Tensor) -> tuple[Tensor, ...]:
        if self.heads == 1:
            return (x_rhn,)
        if x_rhn.shape[-2] != self.heads:
            raise BadInput(f"{self.heads} heads cannot turn {x_rhn.shape[-2]}")
        return x_rhn.unbind(-2)

    def _turn_head(self, x: Tensor, head: int, inverse: bool) -> Tensor:
        rotation = _checked(self)
        fast = None if self.lifted else rotation.fast(self.width, self.key(head))
        if fast is None:
            matrix = self.matrix()[head]
            return x @ (matrix.mT if inverse else matrix)
        if not inverse:
            return apply(fast, x)
        # R = diag(signs) (factor (x) H) with a symmetric H, so R.T turns first and signs last
        ones = torch.ones_like(fast.signs)
        return transform_blocks(x, ones, fast.factor.mT, fast.power) * fast.signs

    def key(self, head: int) -> Key:
        """The random stream of one head: depends on the structure, not on who asks."""
        return Key(f"{self.rotation}/{self.width}/{self.heads}/{head}", self.seed)


def _checked(transform: Transform) -> Rotation:
    rotation = ROTATIONS[transform.rotation]
    if (why := rotation.supports(transform.width)) is not None:
        raise BadInput(f"rotation {transform.rotation!r}: {why}; ask `supports` first")
    if transform.heads < 1:
        raise BadInput(f"rotation {transform.rotation!r}: at least 1 head, not {transform.heads}")
    return rotation


@functools.lru_cache(maxsize=16)
def _matrix(transform: Transform) -> Tensor:
    rotation = _checked(transform)
    heads = [rotation.matrix(transform.width, transform.key(h)) for h in range(transform.heads)]
    if transform.lifted:
        heads = [lift(head) for head in heads]
    return torch.stack(heads)
