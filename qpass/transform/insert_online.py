"""Insert a transform and its inverse on an edge: one half is folded, the other stays online."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.ir import (
    Block,
    ChangeBasis,
    Contract,
    Note,
    Pass,
    Program,
    Step,
    Weight,
    edit,
    read,
)
from qpass.ops.hadamard import HADAMARD
from qpass.plan import Online
from qpass.rotations import Fast, Transform


@final
@dataclass(frozen=True, slots=True)
class SignsOf(Step):
    """The signs of a fast transform, as a weight."""

    transform: Transform

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _fast(self.transform).signs


@final
@dataclass(frozen=True, slots=True)
class FactorOf(Step):
    """The dense factor of a fast transform, as a weight."""

    transform: Transform

    def apply(self, weight: Tensor | None, sources: Mapping[str, Tensor]) -> Tensor:
        return _fast(self.transform).factor


@final
@dataclass(frozen=True)
class InsertOnline(Pass):
    """Rotate the input of chosen products while they run; products of one value share the work."""

    choices: tuple[Online, ...]
    name: str = "insert_online"
    contract: Contract = Contract.EXACT

    def apply(self, program: Program) -> list[Note]:
        # a layer that is called twice is one site with two products, and changes in both
        matmuls: dict[str, list[Matmul | None]] = {}
        for matmul in find_matmuls(program):
            matmuls.setdefault(program.site(matmul.use), []).append(matmul)
        made: dict[tuple[str, Transform], fx.Node] = {}
        return [
            self._insert(program, matmul, choice, made)
            for choice in self.choices
            for matmul in matmuls.get(choice.site, [None])
        ]

    def _insert(
        self,
        program: Program,
        matmul: Matmul | None,
        choice: Online,
        made: dict[tuple[str, Transform], fx.Node],
    ) -> Note:
        if matmul is None:
            return Note(False, choice.site, "there is no such matrix product")
        transform = choice.transform
        width = read.shape(program.node(matmul.use))[matmul.reads]
        if width != transform.width:
            return Note(False, choice.site, f"its input is {width} wide, not {transform.width}")
        if transform.fast() is None:
            return Note(False, choice.site, f"{transform.rotation} has no fast form")
        product, value = program.node(matmul.node), program.node(matmul.value)
        key = (matmul.value, transform)
        if key not in made:
            made[key] = _online(program, value, transform)
        edit.redirect(product, value, made[key])
        step = ChangeBasis(transform, matmul.reads, Block.whole(transform.width))
        program.weights[matmul.use] = program.weights[matmul.use].then(step)
        return Note(True, choice.site, f"{transform.rotation} online")


def _online(program: Program, value: fx.Node, transform: Transform) -> fx.Node:
    fast = _fast(transform)
    signs = _constant(program, "signs", SignsOf(transform), fast.signs)
    factor = _constant(program, "factor", FactorOf(transform), fast.factor)
    before = edit.after(program, value)
    return edit.call(program, before, HADAMARD, value, signs, factor, fast.power, like=value)


def _constant(program: Program, name: str, step: Step, value: Tensor) -> fx.Node:
    """A use of a part of a transform; one serves the whole program."""
    weight = Weight(None, (step,))
    for use, known in program.weights.items():
        if known == weight:
            return program.node(use)
    like = edit.fake_like(program, tuple(value.shape), torch.float32)
    return edit.add_weight(program, f"{name}_{value.shape[0]}", weight, like)


def _fast(transform: Transform) -> Fast:
    fast = transform.fast()
    if fast is None:
        raise TypeError(f"{transform.rotation} has no fast form")
    return fast
