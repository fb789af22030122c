"""Which few batches stand for all: those whose kernel mean is nearest to that of all.

"Generalized Kernel Thinning" (2021) in its second half, KT-swap: from a greedy start (kernel
herding) each chosen batch is exchanged for the one that lowers the maximum mean discrepancy most,
until none does. The first half, which halves at random, is left out: calibration is deterministic.
A batch is described by the mean and the mean square of each channel that the first product reads,
in units of their spread over batches; the kernel is Gaussian, as wide as the median distance.
"""

# b batches, f features

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.analyze import find_matmuls
from qpass.calibrate.stream import Stream
from qpass.ir import Program

# rounds of exchanges; each lowers the discrepancy, and a few end it
ROUNDS = 20


def covering(
    program: Program,
    batches: Sequence[Sequence[object]],
    kept: Sequence[Tensor | None],
    count: int,
) -> list[int]:
    """The places, in order, of `count` batches that stand for all; all where they are no more."""
    products = find_matmuls(program)
    if count >= len(batches) or not products:
        return list(range(min(count, len(batches))))
    order = {node.name: at for at, node in enumerate(program.graph.nodes)}
    first = min((m.value for m in products), key=order.__getitem__)
    values = Stream(program, batches, lambda _: None, {}).advance(first)
    features_bf = torch.stack([_described(x, k) for x, k in zip(values, kept, strict=True)])
    return nearest_subset(features_bf, count)


def nearest_subset(features_bf: Tensor, count: int) -> list[int]:
    """The places, in order, of the `count` rows whose kernel mean is nearest to that of all."""
    scaled_bf = features_bf / features_bf.std(0).clamp_min(1e-12)
    squares_bb = torch.cdist(scaled_bf, scaled_bf).square()
    width = squares_bb[squares_bb > 0].median() if bool((squares_bb > 0).any()) else 1.0
    kernel_bb = (-squares_bb / width).exp()
    mean_b = kernel_bb.mean(1)
    chosen: list[int] = []
    for _ in range(count):
        gain_b = mean_b - _pull(kernel_bb, chosen) / (len(chosen) + 1)
        gain_b[chosen] = -torch.inf
        chosen.append(int(gain_b.argmax()))
    for _ in range(ROUNDS):
        before = list(chosen)
        for at in range(count):
            others = chosen[:at] + chosen[at + 1 :]
            cost_b = kernel_bb.diagonal() + 2 * _pull(kernel_bb, others) - 2 * count * mean_b
            cost_b[others] = torch.inf
            best = int(cost_b.argmin())
            if cost_b[best] < cost_b[chosen[at]]:
                chosen[at] = best
        if chosen == before:
            break
    return sorted(chosen)


def _pull(kernel_bb: Tensor, chosen: Sequence[int]) -> Tensor:
    return kernel_bb[:, list(chosen)].sum(1)


def _described(x: Tensor, kept: Tensor | None) -> Tensor:
    counted = x[kept] if kept is not None and x.shape[:-1] == kept.shape else x
    rows = counted.reshape(-1, x.shape[-1])
    if not len(rows):
        return torch.zeros(2 * x.shape[-1], dtype=torch.float64, device=x.device)
    rows = rows.double()
    return torch.cat((rows.mean(0), rows.square().mean(0)))
