"""What a weight is: a stored tensor and the steps that change it, evaluated once in float64."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol, final

import torch
from torch import Tensor

from qpass.errors import ContractBroken

# 1, -1 for the inverse transpose, or the exponent of a positive diagonal change
Power = int | Fraction


class Basis(Protocol):
    """A basis change, hashable by what it is rather than by its numbers."""

    @property
    def width(self) -> int: ...

    def turn(self, x_rhn: Tensor, *, inverse: bool = False, power: Power = 1) -> Tensor:
        """`x @ T^power` for each head, or undone if `inverse`, in float64; one T may serve all.

        A power of -1 stands for the inverse transpose, so orthogonal changes ignore it; any other
        is one of positive diagonals.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Block:
    """Which entries of an axis are the coordinates of a basis.

    Entry `offset + sum(i * stride)` for all `i < size`, one `(size, stride)` pair per dimension.
    The last dimension runs over the coordinates, dimension `head` (if any) picks the matrix, and
    the others are repetitions that change alike. Equals a whole axis for `Block.whole(n)`.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    head: int | None = None

    @staticmethod
    def whole(n: int) -> Block:
        """All of an axis of length `n`, as one basis."""
        return Block(0, (n,), (1,))

    @property
    def width(self) -> int:
        return self.sizes[-1]

    def indices(self) -> Tensor:
        """`[repeats, heads, width]`: the entry of the axis for each coordinate."""
        at = torch.full((), self.offset, dtype=torch.int64)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            at = at.unsqueeze(-1) + torch.arange(size, dtype=torch.int64) * stride
        if self.head is None:
            return at.reshape(-1, 1, self.width)
        at = at.movedim(self.head, -2)
        return at.reshape(-1, self.sizes[self.head], self.width)


class Step(abc.ABC):
    """One exact change of a weight: a frozen dataclass, so that equal steps compare equal."""

    @abc.abstractmethod
    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        """The changed float64 weight; the argument is not written to (None: a new weight)."""


@final
@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of `sources` by name (None: made by the first step) and the steps applied to it."""

    source: str | None
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> Weight:
        return replace(self, steps=(*self.steps, step))

    def evaluate(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The value, on the CPU: float64 if floating, as stored otherwise; may alias the source."""
        if self.source is not None:
            return self.changed(self.stored(sources), sources)
        if not self.steps:
            raise ContractBroken("a weight without a source needs a step that makes it")
        first, *others = self.steps
        return Weight(None, tuple(others)).changed(first.apply(None, sources), sources)

    def stored(self, sources: Mapping[str, Tensor]) -> Tensor:
        """The tensor that the steps start from, on the CPU."""
        assert self.source is not None
        return _reached(sources[self.source].detach())

    def changed(self, value: Tensor, sources: Mapping[str, Tensor]) -> Tensor:
        """What the steps make of `value`, the stored tensor or some of its rows."""
        value = value.double() if value.is_floating_point() else value
        for step in self.steps:
            value = step.apply(value, sources)
        return value


@final
@dataclass(frozen=True, slots=True)
class Zeros(Step):
    """Make a new weight: a bias that the model did not have."""

    shape: tuple[int, ...]

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64, device="cpu")


@final
@dataclass(frozen=True, slots=True)
class Ones(Step):
    """Make a new weight: the gain of a norm whose own has moved away."""

    shape: tuple[int, ...]

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return torch.ones(self.shape, dtype=torch.float64, device="cpu")


@final
@dataclass(frozen=True, slots=True)
class Numbers(Step):
    """Make a new weight: a vector of numbers that were found."""

    values: tuple[float, ...]

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64, device="cpu")


@final
@dataclass(frozen=True, slots=True)
class Add(Step):
    """Add another weight of the same shape."""

    other: Weight

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _given(weight) + self.other.evaluate(sources)


@final
@dataclass(frozen=True, slots=True)
class Affine(Step):
    """`weight * scale + shift` with two numbers, as in a norm that stores `w` and uses `1 + w`."""

    scale: float
    shift: float

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _given(weight) * self.scale + self.shift


@final
@dataclass(frozen=True, slots=True)
class Reshape(Step):
    """The same entries, in the same order, in another shape."""

    shape: tuple[int, ...]

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _given(weight).reshape(self.shape)


@final
@dataclass(frozen=True, slots=True)
class Permute(Step):
    """The axes in another order."""

    order: tuple[int, ...]

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _given(weight).permute(self.order)


@final
@dataclass(frozen=True, slots=True)
class Join(Step):
    """Another weight behind this one on an axis: products of one value that run as one."""

    other: Weight
    axis: int

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return torch.cat((_given(weight), self.other.evaluate(sources)), self.axis)


@final
@dataclass(frozen=True, slots=True)
class ScaleAxis(Step):
    """Multiply an axis entry by entry with another weight: a norm's gain moving to its reader.

    `repeats` says how often the factor is repeated along the axis, as a whole.
    """

    factor: Weight
    axis: int
    repeats: int = 1

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        factor = self.factor.evaluate(sources).reshape(-1).repeat(self.repeats)
        return torch.movedim(torch.movedim(_given(weight), self.axis, -1) * factor, -1, self.axis)


@final
@dataclass(frozen=True, slots=True)
class AddProduct(Step):
    """Add `vector @ matrix` (`matrix` is `[o, i]` if `transposed`): a bias that absorbs another."""

    matrix: Weight
    vector: Weight
    transposed: bool

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        matrix = self.matrix.evaluate(sources)
        vector = self.vector.evaluate(sources).reshape(-1)
        return _given(weight) + (matrix @ vector if self.transposed else vector @ matrix)


@final
@dataclass(frozen=True, slots=True)
class ChangeBasis(Step):
    """Multiply the coordinates of `block` on `axis` by a power of a basis change.

    Writers multiply by T and readers by its inverse transpose, the power -1, which for orthogonal
    changes is T again (see `qpass.rotations.base`). `inverse` undoes the same.
    """

    basis: Basis
    axis: int
    block: Block
    inverse: bool = False
    power: Power = 1

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        moved = torch.movedim(_given(weight), self.axis, -1)
        at_rhn = self.block.indices()
        if at_rhn.numel() == moved.shape[-1] == self.block.width:
            # the whole axis in order, the usual case: nothing to gather or to keep
            out = self._turn(moved.unsqueeze(-2)).squeeze(-2)
            return torch.movedim(out, -1, self.axis)
        out = moved.clone(memory_format=torch.contiguous_format)
        out[..., at_rhn] = self._turn(moved[..., at_rhn])
        return torch.movedim(out, -1, self.axis)

    def _turn(self, x_rhn: Tensor) -> Tensor:
        return self.basis.turn(x_rhn, inverse=self.inverse, power=self.power)


def _reached(tensor: Tensor) -> Tensor:
    """The tensor where the numbers of steps are, or as it is where it holds none."""
    return tensor if tensor.is_meta else tensor.cpu()


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ContractBroken("this step changes a weight and cannot make one")
    return weight
