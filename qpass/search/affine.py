"""Invertible matrices where weights on both sides absorb them: from values to outputs, above all.

Ma et al., AffineQuant: Affine Transformation Quantization for Large Language Models, 2024. As in
the paper and its code, each matrix starts as the identity, entries away from the diagonal join by
their distance to it as learning goes on, and rows stay strictly dominated by their diagonal entry,
so that there always is an inverse (Levy and Desplanques). Here the regions are those that the
analysis finds free under all invertible matrices, one for each head, and an error costs what it
moves the outputs by: of what reads a region, and of what writes it. At the edges between a norm and
its readers only diagonals fold, which is what other methods find.
"""

# m sampled rows, n output channels, k input channels; h heads, w width of a region

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Region, Site, find_regions
from qpass.errors import BadInput
from qpass.ir import Note
from qpass.plan import Changed, Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Element, Group, Kronecker, Transform
from qpass.search.fake import best_clip, fake
from qpass.search.holdout import Holdout
from qpass.search.regions import turned
from qpass.search.samples import Draws, Sample, applied, changed_places, samples

# steps of learning, the first of which moves each entry by about this much
STEPS, RATE = 80, 0.02
STEP_ROWS, STEP_CHANNELS = 128, 192
HELD_CHANNELS = 512
# how often matrices are compared on the way
LOOKS = 2
# the largest part of a diagonal entry that the others of its row may have together
DOMINATED = 0.9
# an inverse of this width is taken in each step
WIDEST = 512
# what matrices have to gain to be worth it: less is noise of the samples
GAIN = 0.98


@final
@dataclass(frozen=True, slots=True)
class Affine(Chooser):
    """Changes regions that are free under invertible matrices, where that lowers errors."""

    name: str = "affine"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        plan = task.plan
        if not plan.quantized:
            return plan, (Note(False, self.name, "nothing is rounded"),)
        # matrices come before what runs with the model
        after, products = samples(task, replace(plan, online=()))
        online = {o.site: o.transform for o in plan.online}
        running = {use: online.get(after.site(use)) for use in products}
        taken = changed_places(after, plan.changed)
        chosen: list[Changed] = []
        regions = [r for r in find_regions(after, Group.GENERAL) if not r.pins]
        for at, region in enumerate(regions):
            task.advance("learn matrices", at, len(regions))
            places = {(s.use, s.axis) for s in region.sites}
            if region.width > WIDEST or not taken.isdisjoint(places):
                continue
            sides = _Sides.of(region, products, running)
            if sides is not None and (found := sides.learned(plan.recipe.seed)) is not None:
                chosen.append(Changed(region.name, region.group, found))
        task.advance("learn matrices", len(regions), len(regions))
        better = replace(plan, changed=(*plan.changed, *chosen))
        done = f"{len(chosen)} of {len(regions)} regions changed"
        return Holdout(task).better(better, self.name, done)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Sides:
    """A region with the products that read it and those that write it."""

    region: Region
    readers: tuple[tuple[Sample, Site, Transform | Kronecker | None], ...]
    writers: tuple[tuple[Sample, Site, Transform | Kronecker | None], ...]

    @staticmethod
    def of(
        region: Region,
        products: Mapping[str, Sample],
        running: Mapping[str, Transform | Kronecker | None],
    ) -> _Sides | None:
        known = [(products[s.use], s, running[s.use]) for s in region.sites if s.use in products]
        readers = tuple(k for k in known if k[0].matmul.reads == k[1].axis and k[1].power == -1)
        writers = tuple(k for k in known if k[0].matmul.writes == k[1].axis and k[1].power == 1)
        if not readers or len(readers) + len(writers) < len(known):
            return None
        return _Sides(region, readers, writers)

    def learned(self, seed: int) -> Element | None:
        """The matrices that cost least, if any cost less than none."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        held = [s.held(generator) for s, _, _ in (*self.readers, *self.writers)]
        eyes = torch.eye(self.region.width).repeat(self.region.heads, 1, 1)
        least, best = GAIN * self._cost(held, eyes), None
        for matrices in self._matrices(held, generator):
            try:
                found = Element.of("general", matrices)
            except BadInput:
                # dominated rows of very different sizes
                continue
            if (cost := self._cost(held, matrices)) < least:
                least, best = cost, found
        return best

    def _matrices(self, held: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
        """Where Adam goes from identities, on rows that are not held out."""
        h, w = self.region.heads, self.region.width
        sizes = torch.zeros(h, w, requires_grad=True)
        others = torch.zeros(h, w, w, requires_grad=True)
        place = torch.arange(w)
        away = (place - place[:, None]).abs()
        draws = [
            Draws.of(s, some)
            for (s, _, _), some in zip((*self.readers, *self.writers), held, strict=True)
        ]
        clips = {
            id(s): best_clip(s.w_nk[:STEP_CHANNELS].contiguous(), s.entry.weight)
            for s, _, _ in (*self.readers, *self.writers)
        }
        optimizer = torch.optim.Adam([sizes, others], lr=RATE, betas=(0.9, 0.95))
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            joined = (away > 0) & (away <= w * (step + 1) / STEPS)
            matrices = _dominated(sizes, others * joined)
            loss = torch.zeros(())
            for i, (given, site, online) in enumerate((*self.readers, *self.writers)):
                at_m, cost_m = draws[i].rows(given, STEP_ROWS, generator)
                n = len(given.w_nk)
                at_n = torch.randperm(n, generator=generator)[:STEP_CHANNELS]
                error = self._reads if i < len(self.readers) else self._writes
                error_m = error(given, site, online, matrices, at_m, at_n, clips[id(given)])
                loss = loss + (error_m * cost_m).mean()
            gradients = torch.autograd.grad(loss, [sizes, others])
            if not all(bool(g.isfinite().all()) for g in gradients):
                return
            sizes.grad, others.grad = gradients
            optimizer.step()
            if (step + 1) % (STEPS // LOOKS) == 0:
                yield _dominated(sizes, others * joined).detach()

    def _cost(self, held: Sequence[Tensor], matrices: Tensor) -> float:
        """What errors of the held rows cost, rounded as they will be."""
        total = 0.0
        with torch.no_grad():
            for i, (given, site, online) in enumerate((*self.readers, *self.writers)):
                at_n = torch.arange(0, len(given.w_nk), -(-len(given.w_nk) // HELD_CHANNELS))
                error = self._reads if i < len(self.readers) else self._writes
                error_m = error(given, site, online, matrices, held[i], at_n, None)
                total += float((error_m * given.cost_m[held[i]]).mean())
        return total

    def _reads(
        self,
        given: Sample,
        site: Site,
        online: Transform | Kronecker | None,
        matrices: Tensor,
        at_m: Tensor,
        at_n: Tensor,
        clip: float | None,
    ) -> Tensor:
        """The squared errors of rows of a product that reads the region, all channels."""
        x_mk, w_nk = given.x_mk[at_m], given.w_nk[at_n]
        want_mn = x_mk @ w_nk.mT
        x_mk = turned(x_mk, 1, site.block, matrices)
        w_nk = turned(w_nk, 1, site.block, torch.linalg.inv(matrices).mT)
        got_mn = _rounded(given, online, x_mk, w_nk, clip)
        return (got_mn - want_mn).square().mean(1) * len(given.w_nk)

    def _writes(
        self,
        given: Sample,
        site: Site,
        online: Transform | Kronecker | None,
        matrices: Tensor,
        at_m: Tensor,
        at_n: Tensor,
        clip: float | None,
    ) -> Tensor:
        """The same of one that makes the region, whose errors turn back with it."""
        del at_n
        at = site.block.indices().flatten()
        w_nk = turned(given.w_nk, 0, site.block, matrices)
        x_mk = given.x_mk[at_m]
        got_mn = _rounded(given, online, x_mk, w_nk, clip)
        error_mn = turned(got_mn - x_mk @ w_nk.mT, 1, site.block, torch.linalg.inv(matrices))
        return error_mn[:, at].square().sum(1)


def _dominated(sizes: Tensor, others: Tensor) -> Tensor:
    """Matrices `[h, w, w]` with positive diagonals that outweigh the other entries of each row."""
    diagonal = sizes.exp()
    share = others.abs().sum(-1) / diagonal
    return torch.diag_embed(diagonal) + others * (DOMINATED / share.clamp_min(DOMINATED))[..., None]


def _rounded(
    given: Sample,
    online: Transform | Kronecker | None,
    x_mk: Tensor,
    w_nk: Tensor,
    clip: float | None,
) -> Tensor:
    """The outputs of a product; with a clip, so that gradients pass."""
    if online is not None:
        x_mk, w_nk = applied(online, x_mk, 1), applied(online, w_nk, -1)
    if clip is None:
        return given.read(x_mk) @ given.stored(w_nk).mT
    activation = given.entry.activation
    read_mk = x_mk if activation is None else fake(x_mk, activation)
    return read_mk @ fake(w_nk, given.entry.weight, clip).mT


CHOOSERS.add(Affine())
