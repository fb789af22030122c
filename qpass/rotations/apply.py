"""What a fast transform computes: the specification that every kernel must agree with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass.rotations.base import Fast
from qpass.rotations.hadamard_orders import sylvester

# a dense product with a Sylvester matrix up to this order beats its butterflies
_DENSE_POWER = 64


def apply(fast: Fast, x: Tensor) -> Tensor:
    """`x @ R` for the matrix R of `fast`, on the last axis of `x`, in the dtype of `x`."""
    return transform_blocks(x, fast.signs, fast.factor, fast.power)


def transform_blocks(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    """`(x * signs)`, then each block of `m * power` times `factor (x) H_power`.

    `x` is `[..., n]`, `signs` `[n]`, `factor` `[m, m]`; n is a multiple of `m * power`.
    """
    y = x * signs.to(x)
    inner = len(factor) * power
    # a block read as [m, power, ...] meets each Kronecker factor on its own axis
    for piece in (factor.to(x).T, *_pieces(power, x)):
        inner //= len(piece)
        if len(piece) > 1:
            y = piece @ y.reshape(-1, len(piece), inner)
    return y.reshape(x.shape)


def dense(fast: Fast) -> Tensor:
    """The `n x n` matrix of `fast`."""
    block = torch.kron(fast.factor, _orthonormal(fast.power).to(fast.factor))
    count = len(fast.signs) // len(block)
    return fast.signs[:, None] * torch.block_diag(*[block] * count)


def _pieces(power: int, like: Tensor) -> list[Tensor]:
    sizes = list[int]()
    while power > 1:
        sizes.append(min(power, _DENSE_POWER))
        power //= sizes[-1]
    return [_orthonormal(size).to(like) for size in sizes]


def _orthonormal(power: int) -> Tensor:
    return sylvester(power).double() / math.sqrt(power)
