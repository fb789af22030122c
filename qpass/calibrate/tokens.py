"""How much each token counts: by how far the outputs of the model move when a product errs there.

An error `e` of a row of a product's output costs about `|g|^2 |e|^2 / n`, with g the gradient of
the model's loss; rows that later layers hardly look at cost little. Statistics of a stage weigh
the rows of its value by these costs. That is the idea of "GuidedQuant: Large Language Model
Quantization via Exploiting End Loss Guidance" (2025) with one group of channels, and products of
one value together, so that they still share one statistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qpass.calibrate.stages import Stage

# of the mean weight: rows that seem to cost nothing are few samples of what may cost something
LEAST = 0.02


def token_weights(
    stages: Iterable[Stage], rows: Mapping[str, Sequence[Tensor]]
) -> Mapping[str, list[Tensor]]:
    """For each stage, by its value, and each batch: the weight of every row, of mean one.

    `rows` are the costs of `gradients.costs` at the stages' products; stages that no output depends
    on are absent.
    """
    found: dict[str, list[list[Tensor]]] = {}
    for stage in stages:
        for matmul in (*stage.products, *stage.again):
            if (scaled := _of_mean_one(rows.get(matmul.node, []))) is not None:
                found.setdefault(stage.value, []).append(scaled)
    weights: dict[str, list[Tensor]] = {}
    for value, parts in found.items():
        # products of one value may differ in the rows that they read of it
        if len({tuple(map(len, part)) for part in parts}) == 1:
            mean = [torch.stack(of).mean(0) for of in zip(*parts, strict=True)]
            weights[value] = [w.clamp_min(LEAST) for w in mean]
    return weights


def _of_mean_one(rows: Sequence[Tensor]) -> list[Tensor] | None:
    if not rows:
        return None
    every = torch.cat(list(rows)).double()
    mean = float(every.mean()) if len(every) else 0.0
    return [(r / mean).float() for r in rows] if 0 < mean < float("inf") else None
