"""Rotations that make activations even: learned on their kurtosis alone, with no run backward.

Akhondzadeh et al., KurTail: Kurtosis-based LLM Quantization, 2025. What shares a scale is rounded
best when it is spread evenly, and then its kurtosis is 1.8; a Gaussian has 3, and outliers make it
large. The distance from 1.8 is lowered on rows of what products read, all free regions together.
"""

# m sampled rows, b blocks, l entries of a block

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantSpec
from qpass.ir import Note
from qpass.plan import Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.search.holdout import Holdout
from qpass.search.learning import Best, learn
from qpass.search.products import Products, Sampled, prepare
from qpass.search.regions import turned

# the kurtosis of numbers that are spread evenly
EVEN = 1.8
RATE, STEPS, ROWS = 0.03, 100, 256


@final
@dataclass(frozen=True, slots=True)
class KurTail(Chooser):
    """Turns every folded rotation of the plan to where activations have the lightest tails."""

    name: str = "kurtail"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        prepared = prepare(task)
        if isinstance(prepared, str):
            return task.plan, (Note(False, self.name, prepared),)
        trial, products = prepared
        inputs = _inputs(products)
        if not inputs:
            why = "nothing that can turn is quantized while the model runs"
            return task.plan, (Note(False, self.name, why),)
        best = Best(trial, Holdout(task))
        generator = torch.Generator(device="cpu").manual_seed(task.plan.recipe.seed)

        def loss(matrices: Sequence[Tensor], _at: int) -> Tensor:
            return torch.stack([_tails(one, matrices, generator) for one in inputs]).mean()

        learn(best, loss, STEPS, RATE, lambda at, of: task.advance("learn tails", at, of))
        return best.taken(task.plan, self.name, "tails learned")


def _inputs(products: Products) -> list[tuple[Sampled, QuantSpec]]:
    """One product for each value that is read quantized and turns."""
    found: dict[tuple[str, QuantSpec], Sampled] = {}
    for product in products.all:
        spec = products.read_as(product)
        if product.reading and spec is not None:
            found.setdefault((product.matmul.value, spec), product)
    return [(product, spec) for (_, spec), product in found.items()]


def _tails(
    given: tuple[Sampled, QuantSpec], matrices: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """How far the kurtosis of what shares a scale is from that of even numbers, on fresh rows."""
    product, spec = given
    count = len(product.x_mk)
    x_mk = product.x_mk[torch.randint(count, (min(ROWS, count),), generator=generator)]
    for spot in product.reading:
        x_mk = turned(x_mk, 1, spot.block, matrices[spot.stack])
    length = spec.block if isinstance(spec.block, int) else x_mk.shape[1]
    return (kurtosis(x_mk.reshape(-1, length)) - EVEN).abs().mean()


def kurtosis(x_bl: Tensor) -> Tensor:
    """The fourth moment of each block about zero, in units of the second; 0 for zeros."""
    squares_bl = x_bl.square()
    return squares_bl.square().mean(1) / squares_bl.mean(1).square().clamp_min(1e-30)


CHOOSERS.add(KurTail())
