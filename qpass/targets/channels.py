"""Which module stands around a convolution whose weight is for channels that are transformed."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from qpass.rotations import Transform
from qpass.targets.convolved import given_name
from qpass.targets.crossing import gated
from qpass.targets.layers import OnlineTransform


@final
class TurnedChannels(nn.Module):
    """`inner(x R)`, with R for each of the groups of channels along an axis of its first argument.

    The axis is counted from the last. `transposed` says that the weight begins with the channels
    that it reads.
    """

    def __init__(
        self,
        inner: nn.Module,
        transform: Transform,
        dtype: torch.dtype,
        *,
        axis: int,
        groups: int = 1,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.axis = axis
        self.split = groups
        self.transposed = transposed
        self.dtype = dtype
        # masks and the like are what they were
        self.given = given_name(inner)
        self.inner = inner
        self.online = OnlineTransform(transform, dtype)
        show_settings(self, inner)

    @property
    def weight(self) -> object:
        """A copy of the module's weight, for channels that are not transformed."""
        held = getattr(self.inner, "weight", None)
        if not isinstance(held, Tensor) or held.dim() != 1 - self.axis:
            return held
        reads = 0 if self.transposed else 1
        moved = torch.movedim(held.detach(), reads, -1)
        undone = self.online.undo(moved.unflatten(-1, (-1, self.transform.width)))
        return torch.movedim(undone.flatten(-2), -1, reads)

    @property
    def bias(self) -> object:
        """That of the module."""
        return getattr(self.inner, "bias", None)

    @gated
    def forward(self, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401  as the module has them
        if args:
            return self.inner(self._turned(args[0]), *args[1:], **kwargs)
        return self.inner(**{**kwargs, self.given: self._turned(kwargs[self.given])})

    def _turned(self, x: Tensor) -> Tensor:
        y = x.transpose(self.axis, -1)
        if self.split == 1:
            return self.online(y).transpose(self.axis, -1)
        y = self.online(y.unflatten(-1, (self.split, self.transform.width)))
        return y.flatten(-2).transpose(self.axis, -1)

    def extra_repr(self) -> str:
        return f"{self.transform.rotation}, {self.split} x {self.transform.width} channels"


def show_settings(outer: nn.Module, inner: nn.Module) -> None:
    """Let a module have the strides, paddings and the like that code may ask the inner one for."""
    for name, value in vars(inner).items():
        if isinstance(value, int | str | tuple) and name[0] != "_" and name not in vars(outer):
            vars(outer)[name] = value
