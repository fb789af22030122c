"""Randomized Hadamard transforms of equal blocks: cheaper, and local to a quantization group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rotations.apply import dense
from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation, no_such_width
from qpass.rotations.counter import signs
from qpass.rotations.group import Group

_BLOCKS = (16, 32, 64, 128, 256)


@final
@dataclass(frozen=True, slots=True)
class BlockHadamard(Rotation):
    """Blocks of a power of two: `block`, or the largest that divides the width where it is None."""

    name: str
    block: int | None
    group: Group = Group.ORTHOGONAL

    def supports(self, n: int) -> str | None:
        if (why := no_such_width(n)) is not None:
            return why
        if self.block is None:
            return f"width {n} is odd, so no block of a power of two divides it" if n % 2 else None
        return f"width {n} is not a multiple of the block {self.block}" if n % self.block else None

    def matrix(self, n: int, key: Key) -> Tensor:
        return dense(self.fast(n, key))

    def fast(self, n: int, key: Key) -> Fast:
        one = torch.ones(1, 1, dtype=torch.float64)
        return Fast(signs(key, n), one, self.block or n & -n)


ROTATIONS.add(BlockHadamard("block_hadamard", None))
for _block in _BLOCKS:
    ROTATIONS.add(BlockHadamard(f"block_hadamard_{_block}", _block))
