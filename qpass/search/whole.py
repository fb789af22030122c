"""What quantizing does to the outputs of the whole model: the loss that learning ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import find_matmuls
from qpass.ir import Program, fresh, read
from qpass.plan.chooser import Task
from qpass.search.divergence import Wanted
from qpass.search.holdout import Holdout, split
from qpass.search.learning import Best, affordable, learn
from qpass.search.through import Through
from qpass.search.trial import Inputs, Trial

# each coordinate turns, and each logarithm of a scale moves, by about this much at most
RATE = 0.01
# multiplications that learning may take, and how many steps that may be
WORK, LEAST_STEPS, MOST_STEPS = 4.5e13, 10, 100
# forward, forward again and backward
_RUNS = 4


@final
class Whole:
    """The divergence of the quantized program from the float one on some batches."""

    def __init__(
        self,
        trial: Trial,
        before: Program,
        batches: Sequence[Inputs],
        clips: Mapping[str, float],
    ) -> None:
        self._trial, self._batches, self._clips = trial, batches, clips
        self._wanted = Wanted(before, batches)
        products = {m.node for m in find_matmuls(trial.program)}
        # products of narrow numbers are several times faster, and gradients are noisier than them
        self._through = Through(trial.program, products, torch.bfloat16)

    def loss(self, matrices: Sequence[Tensor], batch: int) -> Tensor:
        """The loss on a batch under a further turn, with gradients."""

        def made(use: str) -> Tensor | None:
            return self._trial.made(use, matrices, self._clips)

        return self._wanted.loss(batch, self._through.outputs(self._batches[batch], made))

    def work(self) -> float:
        """About how many multiplications one step of learning takes."""
        program, found = self._trial.program, 0.0
        reads = {m.node: m for m in find_matmuls(program)}

        def count(node: fx.Node, value: object) -> None:
            nonlocal found
            if node.name in reads and isinstance(value, Tensor):
                use = reads[node.name].use
                k = int(read.shape(program.node(use))[reads[node.name].reads])
                found += float(value.numel()) * k

        program.run(*fresh(self._batches[0]), watch=count)
        for use, spots in self._trial.turning.spots.items():
            entries = float(math.prod(map(int, read.shape(program.node(use)))))
            found += entries * sum(spot.block.width for spot in spots)
        return _RUNS * found


def learn_whole(task: Task, trial: Trial) -> Best:
    """The best that is found by the gradients of the whole model, on the data to learn from."""
    best = Best(trial, Holdout(task))
    learning, _ = split(task.batches)
    whole = Whole(trial, task.program, learning, trial.clips())
    generator = torch.Generator(device="cpu").manual_seed(task.plan.recipe.seed)
    order: list[int] = []

    def loss(parameters: Sequence[Tensor], _at: int) -> Tensor:
        if not order:
            order.extend(torch.randperm(len(learning), generator=generator).tolist())
        return whole.loss(parameters, order.pop())

    steps = affordable(WORK, whole.work(), LEAST_STEPS, MOST_STEPS)
    learn(best, loss, steps, RATE, lambda at, of: task.advance("learn transforms", at, of))
    return best
