"""What an online rotation computes: signs, then a Kronecker product with a Hadamard matrix."""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import wide
from qpass.ir import DIFFERENTIABLE
from qpass.ops.library import define


def hadamard(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    """`((x * signs) in blocks) @ (factor (x) H)`, contiguous, in the dtype of `x`.

    x `[..., n]`, signs `[n]`, factor `[m, m]`, orthonormal for a rotation and invertible for any
    other change of basis, H the orthonormal Sylvester matrix of order `power`, n a multiple of the
    block `m * power`. Computed in float32 (float64 for float64).
    """
    if x.requires_grad and torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            # a graph with gradients takes operators that it can differentiate itself
            return _specification(x, signs, factor, power)
        return cast("Tensor", _Differentiable.apply(x, signs, factor, power))
    return torch.ops.qpass.hadamard.default(x, signs, factor, power)


@final
class _Differentiable(torch.autograd.Function):
    """The transform with its gradient for `x`: the transpose, which is a rotation's inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(signs, factor)
        ctx.power = power
        return torch.ops.qpass.hadamard.default(x, signs, factor, power)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        signs, factor = ctx.saved_tensors
        # H is symmetric: signs come last, and the factor turns around
        ones, turned = torch.ones_like(signs), factor.mT.contiguous()
        back = hadamard(gradients[0].contiguous(), ones, turned, ctx.power)
        return back * signs.to(back.dtype), None, None, None


def check_transform(n: int, signs: Tensor, factor: Tensor, power: int) -> None:
    """Raise BadInput unless the parts describe a map of width `n`."""
    if power < 1 or power & (power - 1):
        raise BadInput(f"the order of a Sylvester matrix is a power of two, got {power}")
    if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
        raise BadInput(f"factor is a square matrix, got shape {tuple(factor.shape)}")
    if signs.dim() != 1 or signs.shape[0] != n:
        raise BadInput(f"signs has one entry per channel ({n}), got shape {tuple(signs.shape)}")
    if n % (factor.shape[0] * power):
        raise BadInput(
            f"width {n} is no multiple of the block {factor.shape[0]} x {power}; "
            "choose a factor and a power whose product divides the width"
        )


def transformed(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    """The transform in the dtype of `x`, with the butterflies of H written as sums and differences.

    A block is read as a matrix `X [m, power]` and becomes `factor.T @ X @ H`.
    """
    check_transform(x.shape[-1], signs, factor, power)
    m = factor.shape[0]
    y = (x * signs.to(x.dtype)).reshape(-1, m, power)
    half = 1
    while half < power:
        pairs = y.reshape(-1, m, power // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2)
        half *= 2
    y = factor.to(x.dtype).T @ (y.reshape(-1, m, power) * power**-0.5)
    return y.reshape(x.shape)


def _specification(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    return transformed(x.to(wide(x.dtype)), signs, factor, power).to(x.dtype)


def _shapes(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    return x.new_empty(x.shape)


define(
    "hadamard(Tensor x, Tensor signs, Tensor factor, int power) -> Tensor",
    _specification,
    _shapes,
)

# what a graph calls
HADAMARD = torch.ops.qpass.hadamard.default
DIFFERENTIABLE[HADAMARD] = hadamard
