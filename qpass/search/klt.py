"""Rotations to principal axes, mixed so that all coordinates have one variance.

With K the eigenvectors of the second moments of what products read and H a Hadamard matrix, `x K H`
has coordinates of equal variance (Xu et al., on variance aligned rotation methods, 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Transform, lift
from qpass.search.holdout import Holdout
from qpass.search.products import Products, prepare
from qpass.search.regions import coordinates
from qpass.search.stacks import cheaper

_MIXING = "hadamard"


@final
@dataclass(frozen=True, slots=True)
class Klt(Chooser):
    """Turns every folded rotation of the plan to mixed principal axes, if that is better."""

    name: str = "klt"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        prepared = prepare(task)
        if isinstance(prepared, str):
            return task.plan, (Note(False, self.name, prepared),)
        trial, products = prepared
        turning, seed = trial.turning, task.plan.recipe.seed
        found = [
            _mixed(moments, seed, lifted=lifted)
            for moments, lifted in zip(
                _moments(products, turning.shapes), turning.lifted, strict=True
            )
        ]
        chosen = cheaper(products, turning.shapes, found, seed)
        if chosen is None:
            return task.plan, (Note(False, self.name, "the start is best everywhere"),)
        plan = turning.plan(task.plan, chosen)
        return Holdout(task).better(plan, self.name, "principal axes mixed")


def _moments(products: Products, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Second moments `[h, n, n]` of what is read in each stack, every product counting alike."""
    found = [torch.zeros(h, n, n, dtype=torch.float64) for h, n in shapes]
    for product in products.all:
        for spot in product.reading:
            h, _ = shapes[spot.stack]
            x_mhn = coordinates(product.x_mk, spot.block).flatten(0, 1).double()
            x_hmn = x_mhn.movedim(1, 0) if h > 1 else x_mhn.flatten(0, 1).unsqueeze(0)
            moments = x_hmn.mT @ x_hmn
            found[spot.stack] += moments / moments.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-30)
    return found


def _mixed(moments: Tensor, seed: int, *, lifted: bool) -> Tensor:
    heads, width = moments.shape[:2]
    axes = torch.linalg.eigh(moments).eigenvectors
    mixed = axes @ Transform(_MIXING, width, seed, heads).matrix()
    return (torch.stack([lift(each) for each in mixed]) if lifted else mixed).float()


CHOOSERS.add(Klt())
