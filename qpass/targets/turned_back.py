"""Which modules stand around others that read a value in the basis it had before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from qpass.rotations import Transform
from qpass.targets.crossing import gated
from qpass.targets.layers import Fixed, OnlineTransform


@final
class BackTransform(Fixed):
    """`x -> x R.T` on the last axis, by the fast form of R and, if it is lifted, some vectors."""

    signs: Tensor
    along: Tensor
    added: Tensor

    def __init__(self, transform: Transform, dtype: torch.dtype) -> None:
        super().__init__()
        plain = replace(transform, lifted=False)
        self.middle = OnlineTransform(plain, dtype, inverse=True)
        like, fast = self.middle.signs, plain.fast()
        assert fast is not None
        self.register_buffer("signs", fast.signs.to(like, copy=True), persistent=False)
        # R = Q (I + A.T B), so R.T = (I + B.T A) Q.T
        a_kn, b_kn = transform.lift() if transform.lifted else (fast.signs.new_empty(0, 1),) * 2
        self.register_buffer("along", b_kn.to(like, copy=True), persistent=False)
        self.register_buffer("added", a_kn.to(like, copy=True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = given = x.to(torch.promote_types(x.dtype, self.signs.dtype))
        for along, added in zip(self.along, self.added, strict=True):
            y = y + (given * along).sum(-1, keepdim=True) * added
        return (self.middle(y) * self.signs).to(x.dtype)


@final
class TurnedBack(nn.Module):
    """`inner(x)`, given `x R`: the place of a module in a region of which a part turns."""

    row_by_row = True

    def __init__(self, inner: nn.Module, transform: Transform, dtype: torch.dtype) -> None:
        super().__init__()
        self.transform = transform
        self.dtype = dtype
        self.inner = inner
        self.back = BackTransform(transform, dtype)

    @property
    def weight(self) -> object:
        """That of the module."""
        return getattr(self.inner, "weight", None)

    @property
    def bias(self) -> object:
        """That of the module."""
        return getattr(self.inner, "bias", None)

    @gated
    def forward(self, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401  as the module has them
        given = [self._turned(arg) for arg in args]
        return self.inner(*given, **{name: self._turned(arg) for name, arg in kwargs.items()})

    def _turned(self, arg: object) -> object:
        floating = isinstance(arg, Tensor) and arg.is_floating_point()
        return self.back(arg) if floating else arg

    def extra_repr(self) -> str:
        return f"{self.transform.rotation}, {self.transform.width}"
