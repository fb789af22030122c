"""Scales from data: what is large in activations moves into weights, as far as that lowers errors.

Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models, 2023, with the strength searched region by region (Czakó et al., SmoothRot: Combining
Channel-Wise Scaling and Rotation for Quantization-Friendly LLMs, 2025: scales come in front of a
rotation that runs with the model).
"""

# m sampled rows, n output channels, k input channels; h heads, w width of a region, r repeats

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Region, Site, find_matmuls, find_regions
from qpass.ir import Note, Program
from qpass.plan import Changed, Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Element, Group, Kronecker, Transform
from qpass.search.fake import best_clip, fake
from qpass.search.holdout import Holdout, split
from qpass.search.products import sample
from qpass.search.samples import changed_places
from qpass.transform import carry_out

# how much of an activation's size moves into the weights
STRENGTHS = (0.25, 0.5, 0.75)
# a scale is at most so far from one, either way
LARGEST = 1e3
# what a change has to gain to be worth it: less is noise of the samples
GAIN = 0.98
# output channels that errors are measured on
CHANNELS = 256


@final
@dataclass(frozen=True, slots=True)
class Smooth(Chooser):
    """Adds scales to regions that are free under positive diagonals.

    One of `strengths` for each region: how much of an activation's size moves into the weights.
    Without `balance` the weights have no say in it; `running` is about regions alone that are read
    through transforms.
    """

    name: str = "smooth"
    strengths: tuple[float, ...] = STRENGTHS
    balance: bool = True
    running: bool = False

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        if not task.plan.quantized:
            return task.plan, (Note(False, self.name, "nothing is rounded"),)
        if self.running and not task.plan.online:
            why = "no transform runs in front of a product"
            return task.plan, (Note(False, self.name, why),)
        holdout = Holdout(task)
        learning, _ = split(task.batches)
        # scales come before what runs with the model
        bare = replace(task.plan, online=())
        after = carry_out(task.program, task.folded, bare).program
        products = _Products(task, after, learning)
        regions = find_regions(after, Group.POSITIVE_DIAGONAL)
        taken = changed_places(after, task.plan.changed)
        chosen: list[Changed] = []
        for at, region in enumerate(regions):
            task.advance("find scales", at, len(regions))
            if region.pins or any((s.use, s.axis) in taken for s in region.sites):
                continue
            if (scales := products.scales(region, self)) is not None:
                element = Element.of("diagonal", scales)
                chosen.append(Changed(region.name, region.group, element))
        task.advance("find scales", len(regions), len(regions))
        plan = replace(task.plan, changed=(*task.plan.changed, *chosen))
        return holdout.better(plan, self.name, f"{len(chosen)} regions scaled")


@final
class _Products:
    """The quantized products of a rewritten program, with samples of what they read."""

    def __init__(self, task: Task, after: Program, batches: Sequence[tuple[object, ...]]) -> None:
        entries = {entry.site: entry for entry in task.plan.quantized}
        online = {o.site: o.transform for o in task.plan.online}
        matmuls = [m for m in find_matmuls(after) if after.site(m.use) in entries]
        self._matmuls = {m.use: m for m in matmuls}
        self._entries = {m.use: entries[after.site(m.use)] for m in matmuls}
        self._online = {m.use: online.get(after.site(m.use)) for m in matmuls}
        self._base = {
            use: weight.evaluate(after.sources).float()
            for use, weight in after.weights.items()
            if use in self._matmuls
        }
        seed = task.plan.recipe.seed
        self._rows = sample(task.program, after, matmuls, batches, self._base, seed)

    def scales(self, region: Region, how: Smooth) -> Tensor | None:
        """The scales `[h, w]` of a region that cost least, or None for none."""
        readers = [s for s in region.sites if s.power < 0 and self._reads(s)]
        whole = all(self._scaled_alike(s) for s in region.sites if s.power > 0)
        if not readers or not whole:
            return None
        if how.running and any(self._online[s.use] is None for s in readers):
            return None
        x_hw, w_hw = self._sizes(region, readers)
        flat = torch.zeros(region.heads, region.width, dtype=torch.float64)
        least, best = GAIN * self._cost(readers, flat), None
        for strength in how.strengths:
            scales = (1 - strength) * w_hw.log() * how.balance - strength * x_hw.log()
            # nothing is gained by a common factor
            scales = (scales - scales.mean()).clamp(-_LOG, _LOG)
            if (cost := self._cost(readers, scales)) < least:
                least, best = cost, scales
        return None if best is None else best.exp()

    def _reads(self, site: Site) -> bool:
        matmul = self._matmuls.get(site.use)
        return matmul is not None and matmul.reads == site.axis and site.use in self._rows

    def _scaled_alike(self, site: Site) -> bool:
        """Whether the rows of what writes a region are quantized each by themselves."""
        entry, matmul = self._entries.get(site.use), self._matmuls.get(site.use)
        if entry is None or matmul is None:
            return True
        return site.axis == matmul.writes and entry.weight.block != "tensor"

    def _sizes(self, region: Region, readers: Sequence[Site]) -> tuple[Tensor, Tensor]:
        """The largest activations and weights at each coordinate of a region."""
        x_hw, w_hw = (
            torch.full((region.heads, region.width), 1e-9, dtype=torch.float64) for _ in range(2)
        )
        for site in readers:
            at_rhw, root = site.block.indices(), 1 / abs(float(site.power))
            x_k = self._rows[site.use][0].abs().amax(0).double() ** root
            w_k = self._weight(site.use).abs().amax(0).double() ** root
            # one matrix may serve all heads of a block
            shape = (-1, *x_hw.shape)
            x_hw = torch.maximum(x_hw, x_k[at_rhw].reshape(shape).amax(0))
            w_hw = torch.maximum(w_hw, w_k[at_rhw].reshape(shape).amax(0))
        return x_hw, w_hw

    def _cost(self, readers: Sequence[Site], log_hw: Tensor) -> float:
        return sum(self._error(site, log_hw) for site in readers)

    def _error(self, site: Site, log_hw: Tensor) -> float:
        """What the errors of a product cost when its input is scaled."""
        entry = self._entries[site.use]
        x_mk, cost_m = self._rows[site.use]
        log_k = torch.zeros(x_mk.shape[1], dtype=torch.float64)
        at_rhw = site.block.indices()
        log_k[at_rhw] = (
            (log_hw * -float(site.power))
            .expand(at_rhw.shape[0] * at_rhw.shape[1] // log_hw.shape[0], *log_hw.shape)
            .reshape(at_rhw.shape)
        )
        scale_k = log_k.exp().float()
        w_nk = self._weight(site.use)
        w_nk = w_nk[:: -(-len(w_nk) // CHANNELS)]
        x_mk, w_nk = x_mk * scale_k, w_nk / scale_k
        want_mn = x_mk @ w_nk.mT
        if (transform := self._online[site.use]) is not None:
            x_mk, w_nk = _turned(x_mk, transform, 1), _turned(w_nk, transform, -1)
        read_mk = x_mk if entry.activation is None else fake(x_mk, entry.activation)
        stored_nk = fake(w_nk, entry.weight, best_clip(w_nk, entry.weight))
        error_m = (read_mk @ stored_nk.mT - want_mn).square().mean(1)
        return float((error_m * cost_m).mean()) * len(self._weight(site.use))

    def _weight(self, use: str) -> Tensor:
        base = self._base[use]
        return base if self._matmuls[use].reads == 1 else base.mT


_LOG = float(torch.tensor(LARGEST, dtype=torch.float64).log())


def _turned(x: Tensor, transform: Transform | Kronecker, power: int) -> Tensor:
    return transform.turn(x.unsqueeze(-2), power=power).squeeze(-2)


CHOOSERS.add(Smooth())
