"""Quantized products with samples of what they read, and what the errors of an output cost."""

# m sampled rows, n output channels, k input channels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Matmul, find_matmuls, find_regions
from qpass.ir import Program
from qpass.ops import as_read
from qpass.plan import Changed, Plan, Quantized
from qpass.plan.chooser import Task
from qpass.rotations import Kronecker, Transform
from qpass.rounding import ROUNDINGS, without_data
from qpass.search.holdout import split
from qpass.search.products import sample
from qpass.transform import carry_out

# of the sampled rows, and at most, are those that candidates are compared on
HELD, HELD_ROWS = 0.25, 256


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A quantized product with rows of its input, and what an error of each of them costs."""

    matmul: Matmul
    entry: Quantized
    x_mk: Tensor
    cost_m: Tensor
    w_nk: Tensor

    def held(self, generator: torch.Generator) -> Tensor:
        """The rows that nothing is learned from."""
        count = len(self.x_mk)
        most = min(HELD_ROWS, max(1, round(HELD * count)))
        return torch.randperm(count, generator=generator)[:most]

    def read(self, x_mk: Tensor) -> Tensor:
        """What the product reads instead of an input."""
        activation = self.entry.activation
        return x_mk if activation is None else as_read(x_mk, activation)

    def stored(self, w_nk: Tensor) -> Tensor:
        """What a weight reads as once it is rounded; without data, whatever the plan wants."""
        method = ROUNDINGS[without_data(self.entry.rounding)]
        return method.round(w_nk.contiguous(), self.entry.weight, {}).dequantize(torch.float32)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The rows of a sample that are learned from, and how often each is drawn.

    Half at random, half by what errors cost: a few rows cost more than all others together.
    """

    at_m: Tensor
    odds_m: Tensor

    @staticmethod
    def of(given: Sample, held: Tensor) -> Draws:
        free = torch.ones(len(given.x_mk), dtype=torch.bool, device="cpu")
        free[held] = False
        at_m = free.nonzero().squeeze(1) if bool(free.any()) else held
        share_m = given.cost_m[at_m] * given.x_mk[at_m].square().sum(1)
        share_m = share_m / share_m.sum().clamp_min(1e-30)
        return Draws(at_m, 0.5 * share_m + 0.5 / len(at_m))

    def rows(self, given: Sample, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which rows, and what an error of each of them counts: less if it is drawn often."""
        drawn = torch.multinomial(self.odds_m, count, replacement=True, generator=generator)
        at_m = self.at_m[drawn]
        return at_m, given.cost_m[at_m] / (len(self.at_m) * self.odds_m[drawn])


def samples(task: Task, plan: Plan) -> tuple[Program, dict[str, Sample]]:
    """The program after a plan, and its quantized products by use."""
    entries = {entry.site: entry for entry in plan.quantized}
    after = carry_out(task.program, task.folded, plan).program
    matmuls = [m for m in find_matmuls(after) if after.site(m.use) in entries]
    weights = {m.use: after.weights[m.use].evaluate(after.sources).float() for m in matmuls}
    learning, _ = split(task.batches)
    rows = sample(task.program, after, matmuls, learning, weights, plan.recipe.seed)
    return after, {
        m.use: Sample(
            m,
            entries[after.site(m.use)],
            *rows[m.use],
            weights[m.use] if m.reads == 1 else weights[m.use].mT,
        )
        for m in matmuls
        if m.use in rows
    }


def applied(transform: Transform | Kronecker, x: Tensor, power: int) -> Tensor:
    """The last axis changed by a transform, or by its inverse transpose for a power of -1."""
    return transform.turn(x.unsqueeze(-2), power=power).squeeze(-2)


def changed_places(program: Program, changed: Sequence[Changed]) -> set[tuple[str, int]]:
    """The axes of uses of weights that changes act on.

    Changes of several groups are carried out in an order of their own, so a method leaves what
    another has changed.
    """
    names = {(choice.group, choice.region) for choice in changed}
    return {
        (site.use, site.axis)
        for group in {choice.group for choice in changed}
        for region in find_regions(program, group)
        if any((group, name) in names for name in region.names)
        for site in region.sites
    }
