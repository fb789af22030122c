"""Tensors between walls: reads and writes past an end show, and so do holes in a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# elements on each side: as many as a program may hold, so that no stray write lands elsewhere
WALL = 2**16

aten = torch.ops.aten
_NEW = {
    aten.empty.memory_format: 0,
    aten.empty_strided.default: 0,
    aten.new_empty.default: 1,
    aten.new_empty_strided.default: 1,
    aten.empty_like.default: 1,
    aten.zeros.default: 0,
    aten.new_zeros.default: 1,
}
_ZERO = (aten.zeros.default, aten.new_zeros.default)


def poison(dtype: torch.dtype) -> float | int:
    """What nobody computes by accident: NaN, or a number far from the ends of the range."""
    if dtype.is_floating_point:
        return float("nan")
    return 1 if dtype is torch.bool else 85


class Guarded(TorchDispatchMode):
    """Every tensor made inside holds poison and lies between walls; `broken` tells which fell."""

    def __init__(self) -> None:
        super().__init__()
        self._walls: list[tuple[str, Tensor, Tensor]] = []
        self._given: list[tuple[str, Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _NEW or made.numel() == 0:
            return made
        inside = self._between_walls(made, f"output {len(self._walls)}")
        if func in _ZERO:
            inside.zero_()
        return inside

    def give(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of an input between walls, which must not change."""
        if tensor.numel() == 0:
            return tensor
        inside = self._between_walls(tensor, name)
        inside.copy_(tensor)
        self._given.append((name, inside, tensor.clone()))
        return inside

    def broken(self) -> list[str]:
        """Walls that were written to and inputs that were changed."""
        found = [
            f"{name}: written past an end"
            for name, wall, before in self._walls
            if not torch.equal(wall.view(torch.uint8), before.view(torch.uint8))
        ]
        changed = [
            f"{name}: an input was changed"
            for name, inside, before in self._given
            if not torch.equal(
                inside.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8)
            )
        ]
        return found + changed

    def _between_walls(self, like: Tensor, name: str) -> Tensor:
        span = 1 + sum(
            (size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True)
        )
        memory = torch.full(
            (span + 2 * WALL,), poison(like.dtype), dtype=like.dtype, device=like.device
        )
        for wall in (memory[:WALL], memory[WALL + span :]):
            self._walls.append((name, wall, wall.clone()))
        return memory[WALL:].as_strided(like.shape, like.stride())
