"""Invertible transforms in front of products, learned so that both sides round with least error.

Sun et al., FlatQuant: Flatness Matters for LLM Quantization, 2024: `x T` is read and `W T^-T`
stored, with T a Kronecker product of small matrices. As in its code, learning is by Adam with a
falling rate, the inverse is taken of the matrix itself (one of its two forms), and products of one
value share T. The paper's loss is the error of a block of layers; here it is that of products, by
what it costs the outputs, which needs no run of the model. One of the two factors is free, the
other a Hadamard matrix: that is what the operators multiply by, with one product of the order of
the factor for each value. Channel scales are those of other methods, which fold them; thresholds
are found by the roundings.
"""

# m sampled rows, n output channels, k input channels; o order of the factor, p of the rest

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.ir import Note
from qpass.plan import Online, Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Kronecker, Transform
from qpass.rotations.hadamard_orders import sylvester
from qpass.search.fake import best_clip, fake
from qpass.search.groups import Group, groups
from qpass.search.holdout import Holdout
from qpass.search.samples import Draws, Sample

# steps of learning, the first of which moves each entry by about this much, against entries of 1
STEPS, RATE = 80, 0.02
# how often a factor is compared on the way: some steps have led to where little can be undone
LOOKS = 2
STEP_ROWS, STEP_CHANNELS = 128, 192
# a factor is multiplied by as it is, so beyond this order it costs more than the product it helps
LARGEST_ORDER = 256
# what a transform has to gain to be worth it: less is noise of the samples
GAIN = 0.98


@final
@dataclass(frozen=True, slots=True)
class Flat(Chooser):
    """Puts a learned invertible transform in front of products, where that lowers errors."""

    name: str = "flat"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        if not task.plan.quantized:
            return task.plan, (Note(False, self.name, "nothing is rounded"),)
        _, every = groups(task)
        online = {o.site: o for o in task.plan.online}
        chosen = 0
        for at, group in enumerate(every):
            task.advance("learn transforms", at, len(every))
            transform = _Learner(group).learned(task.plan.recipe.seed)
            if transform is not None:
                online |= {site: Online(site, transform) for site in group.sites}
                chosen += 1
        task.advance("learn transforms", len(every), len(every))
        plan = replace(task.plan, online=tuple(online.values()))
        return Holdout(task).better(plan, self.name, f"{chosen} inputs of {len(every)} flattened")


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """The sizes of a transform and the factor that learning starts from."""

    order: int
    power: int
    start: Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Learner:
    """How the transform of a group is found."""

    group: Group

    def learned(self, seed: int) -> Kronecker | None:
        """The transform that costs least, if any costs less than what the group has."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        held = [p.held(generator) for p in self.group.products]
        least, best = GAIN * self.group.cost(held, self.group.present), None
        for form in self._forms(seed):
            for factor in self._factors(form, held, seed, generator):
                width = self.group.products[0].x_mk.shape[1]
                try:
                    found = Kronecker.of(factor, width, power=form.power, seed=seed)
                except BadInput:
                    # it has come too close to one that cannot be undone
                    continue
                if (cost := self.group.cost(held, found)) < least:
                    least, best = cost, found
        return best

    def _forms(self, seed: int) -> Iterator[_Form]:
        width = self.group.products[0].x_mk.shape[1]
        blocks = {
            spec.block
            for p in self.group.products
            for spec in (p.entry.weight, p.entry.activation)
            if spec is not None and not isinstance(spec.block, str)
        }
        if not blocks:
            if (order := whole_order(width)) is not None:
                start = Transform("hadamard", order, seed).matrix()[0]
                yield _Form(order, width // order, start)
            return
        # scales of their own keep blocks apart: what mixes them mixes what differs
        block = math.gcd(width, *blocks)
        if 1 < block <= LARGEST_ORDER:
            yield _Form(block, 1, torch.eye(block, dtype=torch.float64))
            yield _Form(block, 1, Transform("hadamard", block, seed).matrix()[0])

    def _factors(
        self, form: _Form, held: Sequence[Tensor], seed: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """The start of a form and where Adam goes from it, on rows that are not held out."""
        yield form.start
        width = self.group.products[0].x_mk.shape[1]
        drawn = Kronecker.of(form.start, width, power=form.power, seed=seed).fast().signs.float()
        start = form.start.float()
        # entries of the change are of one size, whatever those of the start
        change = torch.zeros(form.order, form.order, requires_grad=True)
        clips = [_clip(p, drawn, start, form.power) for p in self.group.products]
        rows = [Draws.of(p, some) for p, some in zip(self.group.products, held, strict=True)]
        optimizer = torch.optim.Adam([change], lr=RATE, betas=(0.9, 0.95))
        eye = torch.eye(form.order)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            factor = start @ (eye + change)
            losses = [
                _loss(p, r, c, drawn, factor, form.power, generator)
                for p, r, c in zip(self.group.products, rows, clips, strict=True)
            ]
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), [change])
            if not bool(gradient.isfinite().all()):
                return
            change.grad = gradient
            optimizer.step()
            if (step + 1) % (STEPS // LOOKS) == 0:
                yield (start @ (eye + change)).detach().double()


def whole_order(width: int) -> int | None:
    """The order of the factor of a width: about its root, with a power of two as the rest."""
    order = width // (width & -width)
    while order * order < width:
        order *= 2
    return order if 1 < order <= LARGEST_ORDER else None


def _clip(product: Sample, signs: Tensor, factor: Tensor, power: int) -> float:
    some_nk = product.w_nk[:: -(-len(product.w_nk) // STEP_CHANNELS)]
    return best_clip(
        _turned(some_nk, signs, torch.linalg.inv(factor).mT, power), product.entry.weight
    )


def _loss(
    product: Sample,
    rows: Draws,
    clip: float,
    signs: Tensor,
    factor: Tensor,
    power: int,
    generator: torch.Generator,
) -> Tensor:
    """What the errors of a product cost, on fresh rows and channels."""
    at_m, weight_m = rows.rows(product, STEP_ROWS, generator)
    n = len(product.w_nk)
    at_n = torch.randperm(n, generator=generator)[:STEP_CHANNELS]
    x_mk, w_nk = product.x_mk[at_m], product.w_nk[at_n]
    want_mn = x_mk @ w_nk.mT
    read_mk = _turned(x_mk, signs, factor, power)
    stored_nk = _turned(w_nk, signs, torch.linalg.inv(factor).mT, power)
    if product.entry.activation is not None:
        read_mk = fake(read_mk, product.entry.activation)
    got_mn = read_mk @ fake(stored_nk, product.entry.weight, clip).mT
    return n * ((got_mn - want_mn).square().mean(1) * weight_m).mean()


def _turned(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    """As the operator has it, with a gradient for the factor."""
    y = (x * signs).reshape(-1, len(factor), power)
    return (factor.mT @ (y @ _sylvester(power))).reshape(x.shape)


@functools.cache
def _sylvester(power: int) -> Tensor:
    return sylvester(power).float() * power**-0.5


CHOOSERS.add(Flat())
