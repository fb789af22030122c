"""Which of the stacks of rotated regions are better turned by what a method found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.search.products import Products


def cheaper(
    products: Products, shapes: Sequence[tuple[int, int]], found: Sequence[Tensor], seed: int
) -> list[Tensor] | None:
    """What turns each stack further, one after another: the identity where the start is best.

    None if that is everywhere.
    """
    eyes = [torch.eye(n).repeat(h, 1, 1) for h, n in shapes]
    chosen = list(eyes)
    with torch.no_grad():
        for i in range(len(found)):
            trials = [chosen, [*chosen[:i], found[i], *chosen[i + 1 :]]]
            costs = [_cost(products, matrices, i, seed) for matrices in trials]
            chosen = trials[costs.index(min(costs))]
    return None if all(a is b for a, b in zip(chosen, eyes, strict=True)) else chosen


def _cost(products: Products, matrices: Sequence[Tensor], stack: int, seed: int) -> float:
    """What the errors of the products cost that turn with a stack."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return sum(
        float(products.error(product, matrices, generator))
        for product in products.all
        if any(spot.stack == stack for spot in (*product.reading, *product.writing))
    )
