"""All codes of a model at once, by how far its outputs are from those of the float model.

"DiscQuant: A Quantization Method for Neural Networks Inspired by Discrepancy Theory" (2025): every
weight lies between the two points around it, and moves there by gradients of the divergence of the
outputs, while a linear term pulls it to the nearer point; most end at a point, and the rest is
rounded. The paper's term has the gradient of the divergence beside it in one sum; here it is a step
of its own after each one, which needs no weight to be tuned: left alone it takes every weight to
its nearest point by the end. Scales are those of the given codes. `outputs` learns codes and scales
from the given codes instead, as `blocks` does, but from the model's outputs. Both hold a batch of
values of the whole model in memory, and both keep their start unless the outputs on held-out data
say otherwise. Checked: a term alone gives nearest rounding, and no error on held-out data grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from qpass.calibrate.outputs import Outputs
from qpass.ir import Note, fresh, read
from qpass.plan import Role
from qpass.plan.refiner import REFINERS, Refiner, Refining
from qpass.refine.bottlenecks import Block
from qpass.refine.pair import Pair
from qpass.refine.soft import SoftWeight
from qpass.refine.training import Training, counted, split


@final
@dataclass(frozen=True, slots=True)
class OfOutputs(Refiner):
    """A number of `passes` over the data, in which places and scales come as far as their rates.

    Places are those of the given codes, or, `relaxed`, between the points around the float weight,
    to the nearer of which they are pulled.
    """

    name: str
    relaxed: bool
    passes: int = 4
    rate: float = 0.15
    scale_rate: float = 0.04
    keep: float = 0.9

    def refine(self, task: Refining) -> tuple[Note, ...]:
        pair = Pair(task)
        block = _whole(task, pair)
        if any(map(read.writes, block.nodes)) or not block.ends:
            why = "the model writes to its values, or returns nothing floating"
            return (Note(False, self.name, why),)
        training = _training(task, pair, block)
        learned, held = split(len(task.batches))
        task.advance("refine by outputs", 0, 1)
        training.soften(self.keep)
        before = training.mean(held)
        training.softs.clear()
        training.soften(self.keep, relaxed=self.relaxed)
        softs = list(training.softs.values())
        places = [soft.place_ngl for soft in softs], self.rate
        scales = [scale for soft in softs for scale in soft.scales], self.scale_rate
        pulls = [_Pull(soft) for soft in softs] if self.relaxed else []

        def settle(share: float) -> None:
            for pull in pulls:
                pull.step(share)

        groups = [places] if self.relaxed else [places, scales]
        training.learn(groups, learned, self.passes, settle)
        for soft in softs:
            soft.settle()
        after = training.mean(held)
        task.advance("refine by outputs", 1, 1)
        if not after < before:
            why = f"the start is best on held-out data: {before:.4g}, not {after:.4g}"
            return (Note(False, self.name, why),)
        training.keep()
        return (Note(True, self.name, f"held-out error {before:.4g} becomes {after:.4g}"),)


@final
class _Pull:
    """What takes places to the nearer of their two points, unless something else moves them."""

    def __init__(self, soft: SoftWeight) -> None:
        self._soft = soft
        low, high = soft.around
        place = soft.place_ngl.detach()
        up = place - low > high - place
        # what is left of the way, which the steps together are
        self._way = torch.where(up, high - place, low - place)

    def step(self, share: float) -> None:
        self._soft.place_ngl.add_(self._way, alpha=share).clamp_(*self._soft.around)


def _whole(task: Refining, pair: Pair) -> Block:
    """The whole program as one block, with the products that are no heads."""
    program = task.program
    nodes = tuple(node for node in program.graph.nodes if node.op == "call_function")
    products = (n for n, m in pair.products.items() if pair.entries[m.use].role is Role.LINEAR)
    ends = tuple(node for node in program.outputs if read.is_floating(node))
    return Block(nodes, tuple(products), program.inputs, ends)


def _training(task: Refining, pair: Pair, block: Block) -> Training:
    outputs = Outputs(task.program)
    floating = [read.is_floating(node) for node in task.program.outputs]
    starts = [
        dict[fx.Node, object](zip(task.program.inputs, fresh(batch), strict=True))
        for batch in task.batches
    ]

    def wants(batch: int) -> list[Tensor]:
        made = task.reference.run(*fresh(task.batches[batch]))
        return [
            value
            for value, yes in zip(made, floating, strict=True)
            if isinstance(value, Tensor) and yes
        ]

    def loss(batch: int, got: Sequence[Tensor], want: Sequence[Tensor], half: int | None) -> Tensor:
        parts: list[list[object]] = [[], []]
        ends = iter(zip(got, want, strict=True))
        for yes in floating:
            for part, value in zip(parts, next(ends) if yes else (None, None), strict=True):
                part.append(value if value is None else _counted(value, task.kept[batch], half))
        return outputs.distance(*parts)

    return Training(task, pair, block, starts, wants, loss)


def _counted(value: Tensor, kept: Tensor | None, half: int | None) -> Tensor:
    """The rows of an output that count."""
    some = counted(value, half)
    rows = value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
    if kept is not None and value.shape[:-1] == kept.shape:
        mask = kept.to(torch.bool).reshape(-1)
        some = mask if some is None else some & mask
    return rows if some is None else rows[some]


REFINERS.add(OfOutputs("outputs", relaxed=False))
REFINERS.add(OfOutputs("discquant", relaxed=True, rate=0.5))
