"""How a transform of a value, or its inverse, is written into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from torch import Tensor, fx

from qpass.formats import wide
from qpass.ir import Program, Step, Weight, edit, read
from qpass.ops.hadamard import HADAMARD
from qpass.rotations import Fast, Kronecker, Transform

aten = torch.ops.aten


@final
@dataclass(frozen=True, slots=True)
class SignsOf(Step):
    """The signs of a fast transform, as a weight."""

    transform: Transform | Kronecker

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _fast(self.transform).signs


@final
@dataclass(frozen=True, slots=True)
class FactorOf(Step):
    """The dense factor of a fast transform, or its inverse, as a weight."""

    transform: Transform | Kronecker
    inverse: bool = False

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        factor = _fast(self.transform).factor
        return factor.mT.contiguous() if self.inverse else factor


@final
@dataclass(frozen=True, slots=True)
class OnesOf(Step):
    """As many ones as a transform has signs: those of the first half of its inverse."""

    transform: Transform | Kronecker

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return torch.ones_like(_fast(self.transform).signs)


@final
@dataclass(frozen=True, slots=True)
class LiftOf(Step):
    """One of the vectors by which a lifted transform differs from its fast form, as a weight."""

    transform: Transform
    side: int
    index: int

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return self.transform.lift()[self.side][self.index]


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """What a node does to `value`: it is turned, or turned back; `made` if its maker does that."""

    value: str
    transform: Transform | Kronecker
    inverse: bool
    made: bool


def turned(
    program: Program,
    value: fx.Node,
    transform: Transform | Kronecker,
    *,
    inverse: bool = False,
    made: bool = False,
) -> fx.Node:
    """Insert `value @ R`, or `value @ R.T`, behind a value, in the type of the value."""
    maker = _Maker(program, value, transform)
    before = edit.after(program, value)
    result = value if not inverse else maker.lifted(before, value, inverse=True)
    result = maker.fast(before, result, inverse=inverse)
    result = result if inverse else maker.lifted(before, result, inverse=False)
    result.meta[edit.TURN] = Turn(value.name, transform, inverse, made)
    return result


def turned_along(
    program: Program, value: fx.Node, transform: Transform | Kronecker, axis: int, groups: int = 1
) -> fx.Node:
    """Insert the transform of any axis of a value behind it, or of each of its groups."""
    last = len(read.shape(value)) - 1
    if axis == last and groups == 1:
        return turned(program, value, transform)
    before, moved = edit.after(program, value), value

    def call(target: Callable[..., object], x: fx.Node, *args: object) -> fx.Node:
        return edit.call(program, before, target, x, *args, like=value)

    if axis != last:
        moved = call(aten.transpose.int, moved, axis, last)
    if groups > 1:
        moved = call(aten.unflatten.int, moved, last, [groups, transform.width])
    made = turned(program, moved, transform)
    if groups > 1:
        made = call(aten.flatten.using_ints, made, last, last + 1)
    if axis != last:
        made = call(aten.transpose.int, made, axis, last)
    made.meta[edit.TURN] = Turn(value.name, transform, inverse=False, made=False)
    return made


def turn_of(node: fx.Node) -> Turn | None:
    """What a node is the result of, if that is a transform that a pass has put in."""
    return cast("Turn | None", node.meta.get(edit.TURN))


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Maker:
    """Inserts the steps of one transform of one value."""

    program: Program
    value: fx.Node
    transform: Transform | Kronecker

    def fast(self, before: fx.Node, x: fx.Node, *, inverse: bool) -> fx.Node:
        """`x @ Q` or `x @ Q.T` by the fast form of Q."""
        plain = unlifted(self.transform)
        fast = _fast(plain)
        signs = self._constant("signs", SignsOf(plain), fast.signs)
        factor = self._constant("factor", FactorOf(plain, inverse), fast.factor)
        first = self._constant("ones", OnesOf(plain), fast.signs) if inverse else signs
        made = self._call(before, HADAMARD, x, first, factor, fast.power)
        # Q = diag(signs) (factor (x) H) with a symmetric H, so Q.T turns first and signs last
        return self._typed(before, self._multiplied(before, made, signs)) if inverse else made

    def lifted(self, before: fx.Node, x: fx.Node, *, inverse: bool) -> fx.Node:
        """`x (I + A.T B)`, or `x (I + B.T A)`, for a lifted transform; else x itself."""
        transform = self.transform
        if isinstance(transform, Kronecker) or not transform.lifted:
            return x
        count = len(transform.lift()[0])
        terms: list[fx.Node] = []
        for k in range(count):
            sides = (1, 0) if inverse else (0, 1)
            a, b = (self._vector(transform, side, k) for side in sides)
            product = self._multiplied(before, x, a)
            along = self._call(before, aten.sum.dim_IntList, product, [-1], True)
            terms.append(self._call(before, aten.mul.Tensor, along, b))
        made = x
        for term in terms:
            made = self._call(before, aten.add.Tensor, made, term)
        return self._typed(before, made)

    def _multiplied(self, before: fx.Node, x: fx.Node, vector: fx.Node) -> fx.Node:
        return self._call(before, aten.mul.Tensor, x, vector)

    def _typed(self, before: fx.Node, x: fx.Node) -> fx.Node:
        """In the type of the value, whatever the type of the constants."""
        dtype = read.dtype(self.value)
        return x if read.dtype(x) == dtype else self._call(before, aten.to.dtype, x, dtype)

    def _vector(self, transform: Transform, side: int, index: int) -> fx.Node:
        step = LiftOf(transform, side, index)
        return self._constant("lift", step, transform.lift()[side][index])

    def _constant(self, name: str, step: Step, value: Tensor) -> fx.Node:
        """A use of a part of a transform; one serves the whole program."""
        weight = Weight(None, (step,))
        dtype = wide(read.dtype(self.value) or torch.float32)
        for use, known in self.program.weights.items():
            if known == weight and read.dtype(self.program.node(use)) is dtype:
                return self.program.node(use)
        like = edit.fake_like(self.program, tuple(value.shape), dtype)
        return edit.add_weight(self.program, f"{name}_{value.shape[0]}", weight, like)

    def _call(self, before: fx.Node, target: Callable[..., object], *args: object) -> fx.Node:
        return edit.call(self.program, before, target, *args, like=self.value)


def unlifted(transform: Transform | Kronecker) -> Transform | Kronecker:
    """The same without its lift."""
    return replace(transform, lifted=False) if isinstance(transform, Transform) else transform


def _fast(transform: Transform | Kronecker) -> Fast:
    fast = transform.fast()
    if fast is None:
        raise TypeError(f"{transform.rotation} has no fast form")
    return fast
