"""How orthogonal matrices are learned: steps along the group, never across it.

A step multiplies by the Cayley transform of a skew matrix, `(I - A/2)^-1 (I + A/2)`, whose entries
are Adam's of the gradient in the group's algebra (Li, Fuxin and Todorovic, Efficient Riemannian
Optimization on the Stiefel Manifold via the Cayley Transform, 2020; SpinQuant, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

_BETAS = (0.95, 0.95)
_EPSILON = 1e-10


@final
class Learner:
    """Adam for several stacks `[h, n, n]` of orthogonal matrices; they start as identities.

    `start` are others to start from. Those of `lifted` stacks fix the all-ones vector. The `rate`
    of a step is about the angle, in radians, by which each coordinate turns. `numbers` are learned
    beside them, each by itself and by as much.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        lifted: Sequence[bool],
        start: Sequence[Tensor] | None = None,
        numbers: Sequence[Tensor] = (),
    ) -> None:
        eyes = [torch.eye(n, dtype=torch.float32, device="cpu").repeat(h, 1, 1) for h, n in shapes]
        self.matrices = eyes if start is None else [matrix.clone() for matrix in start]
        self._means = [torch.zeros_like(q) for q in self.matrices]
        self._squares = [torch.zeros_like(q) for q in self.matrices]
        self.numbers = [number.clone() for number in numbers]
        self._number_means = [torch.zeros_like(x) for x in self.numbers]
        self._number_squares = [torch.zeros_like(x) for x in self.numbers]
        for each in (*self.matrices, *self.numbers):
            each.requires_grad_()
        self._lifted = tuple(lifted)
        self._count = 0

    def step(self, loss: Tensor, rate: float) -> None:
        """Move every matrix and number against the gradient of `loss`."""
        every = [*self.matrices, *self.numbers]
        grads = torch.autograd.grad(loss, every, allow_unused=True, materialize_grads=True)
        self._count += 1
        with torch.no_grad():
            for i, grad in enumerate(grads):
                if not bool(grad.isfinite().all()):
                    continue
                if i < len(self.matrices):
                    self._move(i, grad, rate)
                else:
                    self._shift(i - len(self.matrices), grad, rate)

    def _move(self, i: int, grad: Tensor, rate: float) -> None:
        matrix, mean, square = self.matrices[i], self._means[i], self._squares[i]
        tangent = matrix.mT @ grad
        tangent = tangent - tangent.mT
        if self._lifted[i]:
            tangent = _without_ones(tangent)
        mean.lerp_(tangent, 1 - _BETAS[0])
        square.lerp_(tangent.square(), 1 - _BETAS[1])
        # all planes of a stack share one size of gradient: theirs alone would be mostly noise
        size = (square.mean() / (1 - _BETAS[1] ** self._count)).sqrt() + _EPSILON
        skew = mean / (1 - _BETAS[0] ** self._count) / size
        turned = _cayley(skew * (-rate / matrix.shape[-1] ** 0.5))
        new = matrix @ turned
        # one step of Newton's iteration takes away what rounding has added
        matrix.copy_(1.5 * new - 0.5 * new @ (new.mT @ new))

    def _shift(self, i: int, grad: Tensor, rate: float) -> None:
        mean, square = self._number_means[i], self._number_squares[i]
        mean.lerp_(grad, 1 - _BETAS[0])
        square.lerp_(grad.square(), 1 - _BETAS[1])
        size = (square / (1 - _BETAS[1] ** self._count)).sqrt() + _EPSILON
        self.numbers[i].sub_(mean / (1 - _BETAS[0] ** self._count) / size, alpha=rate)

    def values(self) -> list[Tensor]:
        """The matrices as they are now, and the numbers after them."""
        return [each.detach().clone() for each in (*self.matrices, *self.numbers)]


def project(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrices in float64."""
    u, _, v = torch.linalg.svd(matrix.double())
    return u @ v


def _cayley(skew: Tensor) -> Tensor:
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye - skew / 2, eye + skew / 2)


def _without_ones(skew: Tensor) -> Tensor:
    """The part of a skew matrix that moves nothing along the all-ones vector."""
    rows = skew - skew.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)
