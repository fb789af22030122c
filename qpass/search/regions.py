"""Which regions can be turned further, and how a weight changes with them, differentiably."""

# h matrices, n width of a region, r repeats of a block

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Region, by_name, rotatable_regions
from qpass.ir import Block, ChangeBasis, Program
from qpass.plan import Plan, Rotated
from qpass.rotations import Element, lift
from qpass.search.orthogonal import project


@final
@dataclass(frozen=True, slots=True)
class Spot:
    """Coordinates of a use of a weight that turn with the stack of matrices number `stack`."""

    axis: int
    block: Block
    stack: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Turning:
    """The rotated regions of a plan as stacks of matrices that turn what they have turned before.

    `stacks` are the choices that each stack serves: regions in which one stored tensor is used
    twice turn alike. `spots` say where in the rewritten program's weights.
    """

    stacks: tuple[tuple[Rotated, ...], ...]
    spots: Mapping[str, tuple[Spot, ...]]

    @staticmethod
    def of(folded: Program, after: Program, plan: Plan) -> Turning:
        """What is rotated in `after`, the program after `plan`, and is not changed again there."""
        regions = by_name(rotatable_regions(folded))
        found = [c for c in plan.rotated if c.region in regions]
        free = [c for c in found if _last(after, regions[c.region], c)]
        stacks = alike(after, regions, free)
        spots: dict[str, list[Spot]] = {}
        for i, stack in enumerate(stacks):
            for choice in stack:
                for site in regions[choice.region].sites:
                    if site.use in after.weights:
                        spots.setdefault(site.use, []).append(Spot(site.axis, site.block, i))
        return Turning(stacks, {use: tuple(some) for use, some in spots.items()})

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Matrices and width of each stack."""
        return [(s[0].transform.heads, s[0].transform.width) for s in self.stacks]

    @property
    def lifted(self) -> list[bool]:
        return [stack[0].transform.lifted for stack in self.stacks]

    def weight(self, use: str, base: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """A weight of the rewritten program after it has turned further."""
        for spot in self.spots.get(use, ()):
            base = turned(base, spot.axis, spot.block, matrices[spot.stack])
        return base

    def plan(self, plan: Plan, matrices: Sequence[Tensor]) -> Plan:
        """The plan that turns regions as it did and then by `matrices`, made exact in float64."""
        made: dict[str, Rotated] = {}
        for stack, further in zip(self.stacks, matrices, strict=True):
            first = stack[0].transform
            both = project(first.matrix() @ project(further))
            if first.lifted:
                both = torch.stack([lift(each) for each in both])
            element = Element.of("orthogonal", both, lifted=first.lifted)
            made |= {choice.region: Rotated(choice.region, element) for choice in stack}
        return replace(plan, rotated=tuple(made.get(c.region, c) for c in plan.rotated))


def turned(value: Tensor, axis: int, block: Block, matrices_hnn: Tensor) -> Tensor:
    """`value` with the coordinates of a block multiplied by one matrix, or one for each head."""
    moved = torch.movedim(value, axis, -1)
    if _entries(block) == moved.shape[-1] == block.width:
        return torch.movedim(moved @ matrices_hnn[0], -1, axis)
    at_rhn = _indices(block)
    part = moved[..., at_rhn]
    if len(matrices_hnn) == 1:
        part = part @ matrices_hnn[0]
    else:
        part = torch.einsum("...rhn,hnm->...rhm", part, matrices_hnn)
    out = moved.index_copy(-1, at_rhn.reshape(-1), part.flatten(-3))
    return torch.movedim(out, -1, axis)


def coordinates(value_mk: Tensor, block: Block) -> Tensor:
    """The entries of a block of the last axis, `[m, r, h, n]`."""
    return value_mk[:, _indices(block)]


def _entries(block: Block) -> int:
    return int(torch.Size(block.sizes).numel())


@functools.lru_cache(maxsize=256)
def _indices(block: Block) -> Tensor:
    return block.indices()


def _last(after: Program, region: Region, choice: Rotated) -> bool:
    """Whether nothing has changed a region's coordinates after its rotation."""
    for site in region.sites:
        if (weight := after.weights.get(site.use)) is None:
            continue
        steps = [s for s in weight.steps if isinstance(s, ChangeBasis) and s.axis == site.axis]
        mine = [s for s in steps if s.block == site.block and s.basis == choice.transform]
        overlapping = steps[steps.index(mine[-1]) + 1 :] if mine else []
        if not mine or any(_overlap(s.block, site.block) for s in overlapping):
            return False
    return True


def _overlap(a: Block, b: Block) -> bool:
    return bool(torch.isin(_indices(a), _indices(b)).any())


def alike(
    after: Program, regions: Mapping[str, Region], choices: Sequence[Rotated]
) -> tuple[tuple[Rotated, ...], ...]:
    """Choices by which a stored tensor changes in several uses, together."""
    first: dict[tuple[object, ...], int] = {}
    stack = list(range(len(choices)))
    for i, choice in enumerate(choices):
        for site in regions[choice.region].sites:
            if (owner := after.owners.get(site.use)) is None:
                continue
            other = stack[first.setdefault((owner.path, site.axis, site.block), i)]
            mine = stack[i]
            stack = [other if s == mine else s for s in stack]
    return tuple(
        tuple(c for c, s in zip(choices, stack, strict=True) if s == each)
        for each in dict.fromkeys(stack)
    )
