"""Which modules stand around others whose neighbours turn while they themselves do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from qpass.rotations import Transform
from qpass.targets.crossing import gated
from qpass.targets.layers import Fixed, OnlineTransform


@final
class WholeTransform(Fixed):
    """`x -> x R`, or `x -> x R.T`, on the last axis: the fast form of R and its lift, if any."""

    signs: Tensor
    along: Tensor
    added: Tensor

    def __init__(self, transform: Transform, dtype: torch.dtype, *, inverse: bool) -> None:
        super().__init__()
        self.inverse = inverse
        plain = replace(transform, lifted=False)
        self.fast = OnlineTransform(plain, dtype, inverse=inverse)
        like, fast = self.fast.signs, plain.fast()
        assert fast is not None
        self.register_buffer("signs", fast.signs.to(like, copy=True), persistent=False)
        # R = Q (I + A.T B), so R.T = (I + B.T A) Q.T
        a_kn, b_kn = transform.lift() if transform.lifted else (fast.signs.new_empty(0, 1),) * 2
        along, added = (b_kn, a_kn) if inverse else (a_kn, b_kn)
        self.register_buffer("along", along.to(like, copy=True), persistent=False)
        self.register_buffer("added", added.to(like, copy=True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, self.signs.dtype))
        # the fast form of an inverse lacks its signs, which come last
        y = self.fast(self._lifted(y)) * self.signs if self.inverse else self._lifted(self.fast(y))
        return y.to(x.dtype)

    def _lifted(self, x: Tensor) -> Tensor:
        y = x
        for along, added in zip(self.along, self.added, strict=True):
            y = y + (x * along).sum(-1, keepdim=True) * added
        return y


@final
class Turned(nn.Module):
    """`inner(x R.T) S`: the place of a module between parts of a region that turn.

    `before` is R and `after` is S; None where the module reads, or makes, values as they were.
    """

    row_by_row = True

    def __init__(
        self,
        inner: nn.Module,
        before: Transform | None,
        after: Transform | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.transforms = (before, after)
        self.dtype = dtype
        self.inner = inner
        self.before = None if before is None else WholeTransform(before, dtype, inverse=True)
        self.after = None if after is None else WholeTransform(after, dtype, inverse=False)

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
        given = [_through(self.before, arg) for arg in args]
        named = {name: _through(self.before, arg) for name, arg in kwargs.items()}
        return _through(self.after, self.inner(*given, **named))

    def extra_repr(self) -> str:
        return ", ".join(f"{t.rotation}, {t.width}" for t in self.transforms if t is not None)


def _through(transform: nn.Module | None, value: object) -> object:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return transform(value) if transform is not None and floating else value
