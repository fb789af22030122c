"""Which regions can be scaled, and how a weight changes with that, differentiably."""

# h heads, w width of a region

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Region, Site, find_regions
from qpass.ir import Basis, ChangeBasis, Program, Step
from qpass.plan import Changed, Plan
from qpass.rotations import Element, Group
from qpass.search.regions import turned

# a scale is at most so far from one, either way
LARGEST = math.log(1e3)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """The free regions of positive diagonals, and what the program does to weights after scales.

    A scale is given by its logarithm, `[h, w]` for each region.
    """

    regions: tuple[Region, ...]
    sites: Mapping[str, tuple[tuple[int, Site], ...]]
    behind: Mapping[str, tuple[ChangeBasis, ...]]

    @staticmethod
    def of(bare: Program, after: Program, plan: Plan) -> Scaling:
        """Regions of `bare`, which is `after` without the transforms that run with it."""
        held = {(choice.region, choice.group) for choice in plan.changed}
        found: list[Region] = []
        for region in find_regions(bare, Group.POSITIVE_DIAGONAL):
            if region.pins or (region.name, region.group) in held:
                continue
            if all(_behind(bare, after, site) is not None for site in region.sites):
                found.append(region)
        sites: dict[str, tuple[tuple[int, Site], ...]] = {}
        for i, region in enumerate(found):
            for site in region.sites:
                sites[site.use] = (*sites.get(site.use, ()), (i, site))
        behind = {use: _behind(bare, after, some[0][1]) or () for use, some in sites.items()}
        return Scaling(tuple(found), sites, behind)

    def start(self) -> list[Tensor]:
        """The logarithms that scale nothing."""
        return [
            torch.zeros(r.heads, r.width, dtype=torch.float32, device="cpu") for r in self.regions
        ]

    def weight(self, use: str, value: Tensor, logs: Sequence[Tensor]) -> Tensor:
        """A weight without what is behind its scales, with both."""
        for i, site in self.sites[use]:
            scales_hw = (logs[i].clamp(-LARGEST, LARGEST) * float(site.power)).exp()
            value = _scaled(value, site, scales_hw)
        for step in self.behind[use]:
            value = turned(value, step.axis, step.block, _matrix(step.basis, step.inverse))
        return value

    def plan(self, plan: Plan, logs: Sequence[Tensor]) -> Plan:
        """The plan with these scales."""
        chosen = tuple(
            Changed(
                region.name,
                region.group,
                Element.of("diagonal", log.double().clamp(-LARGEST, LARGEST).exp()),
            )
            for region, log in zip(self.regions, logs, strict=True)
        )
        return replace(plan, changed=(*plan.changed, *chosen))


def _scaled(value: Tensor, site: Site, scales_hw: Tensor) -> Tensor:
    at_rhw = site.block.indices()
    scale_n = torch.ones(value.shape[site.axis], dtype=value.dtype, device=value.device)
    every_rhw = scales_hw.to(value.dtype).expand(at_rhw.shape)
    scale_n = scale_n.index_copy(0, at_rhw.reshape(-1), every_rhw.reshape(-1))
    shape = [1] * value.dim()
    shape[site.axis] = -1
    return value * scale_n.reshape(shape)


@functools.lru_cache(maxsize=16)
def _matrix(basis: Basis, inverse: bool) -> Tensor:
    """`[1, n, n]`: what one head is multiplied with."""
    eye = torch.eye(basis.width, dtype=torch.float64, device="cpu").unsqueeze(1)
    return basis.turn(eye, inverse=inverse).movedim(-2, 0).float()


def _behind(bare: Program, after: Program, site: Site) -> tuple[ChangeBasis, ...] | None:
    """What happens to a weight after its scales; None for what cannot be done again here."""
    if site.use not in after.weights or site.use not in bare.weights:
        return None
    done: tuple[Step, ...] = bare.weights[site.use].steps
    steps = after.weights[site.use].steps
    if steps[: len(done)] != done:
        return None
    found = steps[len(done) :]
    kept = tuple(s for s in found if isinstance(s, ChangeBasis) and s.block.head is None)
    return kept if len(kept) == len(found) else None
