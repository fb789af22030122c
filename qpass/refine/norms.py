"""Gains and biases of norms make up for what rounding did to the distributions of channels.

"Norm Tweaking: High-performance Low-bit Quantization of Large Language Models" (2023): norms are
trained, layer after layer, until every channel of a layer's output has the mean and the variance
that it has in the float model. Here each channel counts in units of its own deviation, so that loud
ones do not stand for all, gains that have moved into the weights behind a norm start from ones, and
a block keeps its norms unless held-out data say that the error of its output has become smaller.
Norms are found by their operators. Checked: no error on held-out data grows, norms that several
places share stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import find_gain
from qpass.ir import Note, Program, read
from qpass.plan.refiner import REFINERS, Refiner, Refining
from qpass.refine.bottlenecks import Block, blocks_of
from qpass.refine.errors import find_costs, loss_of
from qpass.refine.pair import Pair
from qpass.refine.training import Training, counted, split, taken

aten = torch.ops.aten
TINY = 1e-12


@final
@dataclass(frozen=True, slots=True)
class Norms(Refiner):
    """A number of `passes` over the data, in which a gain or a bias can come as far as `rate`."""

    name: str = "norms"
    passes: int = 2
    rate: float = 0.02

    def refine(self, task: Refining) -> tuple[Note, ...]:
        pair = Pair(task)
        found = [(block, vectors_of(task.program, block)) for block in blocks_of(task, pair)]
        blocks = [(block, uses) for block, uses in found if uses]
        if not blocks:
            why = "no block between bottlenecks of the model has a norm with a gain of its own"
            return (Note(False, self.name, why),)
        costs = find_costs(task, [end.name for block, _ in blocks for end in block.ends])
        learned, held = split(len(task.batches))
        before = after = 0.0
        gained = 0
        for at, (block, uses) in enumerate(blocks):
            task.advance("refine norms", at, len(blocks))
            starts = pair.quantized.before(block.first)
            wants = [pair.float.advance(end.name) for end in block.ends]
            judge = loss_of([costs[end.name] for end in block.ends])
            training = Training(task, pair, block, starts, taken(wants), judge)
            for use in uses:
                value = task.program.weights[use].evaluate(task.program.sources)
                training.vectors[use] = value.float().clone().requires_grad_()
            first = last = training.mean(held)
            vectors = list(training.vectors.values())
            training.loss = _moments
            training.learn([(vectors, self.rate)], learned, self.passes)
            training.loss = judge
            if (end := training.mean(held)) < first:
                training.keep()
                last = end
                gained += 1
            before, after = before + first, after + last
        task.advance("refine norms", len(blocks), len(blocks))
        why = f"{gained} of {len(blocks)} blocks: held-out error {before:.4g} becomes {after:.4g}"
        return (Note(gained > 0, self.name, why),)


def vectors_of(program: Program, block: Block) -> list[str]:
    """The uses of gains and biases of a block's norms that the model holds for them alone."""
    owned = Counter(owner.path for owner in program.owners.values())
    found: list[str] = []
    for node in block.nodes:
        for use in _affine(program, node):
            owner = program.owners.get(use.name)
            alone = owner is not None and owned[owner.path] == 1 and len(use.users) == 1
            if alone and len(read.shape(use)) == 1:
                found.append(use.name)
    return found


def _affine(program: Program, node: fx.Node) -> Iterator[fx.Node]:
    if (gain := find_gain(program, node)) is not None:
        yield gain.gain
    if read.calls(node, aten.layer_norm.default, aten.rms_norm.default):
        for name in ("weight", "bias"):
            use = read.optional_value(node, name) if read.has(node, name) else None
            if use is not None and program.weight(use) is not None:
                yield use


def _moments(batch: int, got: Sequence[Tensor], want: Sequence[Tensor], half: int | None) -> Tensor:
    """How far means and variances of channels are apart, in units of the float model's."""
    parts: list[Tensor] = []
    for found, wished in zip(got, want, strict=True):
        some = counted(found, half)
        (mean_d, variance_d), (wish_d, spread_d) = (
            _mean_and_variance(value.float().reshape(-1, value.shape[-1]), some)
            for value in (found, wished)
        )
        spread_d = spread_d.clamp_min(TINY)
        apart_d = (mean_d - wish_d).abs() / spread_d.sqrt()
        parts.append((apart_d + (variance_d - spread_d).abs() / spread_d).mean())
    return torch.stack(parts).sum()


def _mean_and_variance(rows_md: Tensor, some: Tensor | None) -> tuple[Tensor, Tensor]:
    rows_md = rows_md if some is None else rows_md[some]
    return rows_md.mean(0), rows_md.var(0, unbiased=False)


REFINERS.add(Norms())
