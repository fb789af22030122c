"""What a fast transform computes: the specification that every kernel must agree with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass.rotations.base import Fast
from qpass.rotations.hadamard_orders import sylvester

# a dense product with a Sylvester matrix up to this order beats its butterflies
_DENSE_POWER = 64
# entries turned at once: what is made between two factors stays in a core's cache
CHUNK = 2**17


def apply(fast: Fast, x: Tensor) -> Tensor:
    """`x @ R` for the matrix R of `fast`, on the last axis of `x`, in the dtype of `x`."""
    return transform_blocks(x, fast.signs, fast.factor, fast.power)


def transform_blocks(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    """`(x * signs)`, then each block of `m * power` times `factor (x) H_power`.

    `x` is `[..., n]`, `signs` `[n]`, `factor` `[m, m]`; n is a multiple of `m * power`.
    """
    n = x.shape[-1]
    signs_n1 = signs.to(x).unsqueeze(1)
    pieces = [piece for piece in (factor.to(x).mT, *_pieces(power, x)) if len(piece) > 1]
    turned: list[Tensor] = []
    for part_rn in x.reshape(-1, n).split(max(1, CHUNK // n)):
        # with rows along the last axis every Kronecker factor is one product with long rows
        y = part_rn.mT * signs_n1
        inner = len(factor) * power
        outer = n // inner
        for piece in pieces:
            inner //= len(piece)
            y = piece @ y.reshape(outer, len(piece), inner * len(part_rn))
            outer *= len(piece)
        turned.append(y.reshape(n, len(part_rn)).mT)
    return torch.cat(turned).reshape(x.shape)


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
