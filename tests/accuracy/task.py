"""What is measured of a model: a way to read it, data to calibrate with, and what it lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import qpass
from qpass.plan import Recipe

# the name of what chooses between methods
JUDGED = "judged"

Batch = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Measured:
    """Numbers by name, of which the first ranks; on how many samples, after how many seconds."""

    values: dict[str, float]
    samples: int
    seconds: float


@dataclass(frozen=True)
class Task:
    """A real model and what it is used for.

    `calibration` gives batches for an amount, `lost` compares a model with its float self on every
    n-th of the evaluation samples and says on how many it did; `judged` does so on samples that are
    neither: what chooses between methods.
    """

    read: Callable[[], nn.Module]
    calibration: Callable[[int], Sequence[Batch]]
    sample: Callable[[], Batch]
    lost: Callable[[nn.Module, nn.Module, int], tuple[Mapping[str, float], int]]
    judged: Callable[[nn.Module, nn.Module], float]
    amount: int  # of calibration samples
    every: int
    seeds: int
    settings: tuple[str, ...]
    methods: tuple[str, ...]

    def measured(self, recipe: Recipe, amount: int, every: int) -> Measured:
        """Quantize the model by `recipe` and compare it with the float32 one."""
        model, reference = self.read().float().eval(), self.read().float().eval()
        start = time.perf_counter()
        qpass.quantize(model, recipe, calibration=self.calibration(amount), inputs=self.sample())
        seconds = time.perf_counter() - start
        values, samples = self.lost(model, reference, every)
        values = {**values, JUDGED: self.judged(model, reference)}
        return Measured(values, samples, round(seconds, 1))


def predictions_lost(
    model: nn.Module, reference: nn.Module, batches: Sequence[Batch]
) -> tuple[dict[str, float], int]:
    """What a model that predicts tokens lost, and over how many."""
    found = qpass.evaluate(model, reference, batches)
    values = {
        "KL": found.kl.value,
        "+- KL": found.kl.error,
        "perplexity": found.perplexity.value,
        "float": found.reference_perplexity.value,
        "top-1": found.agreement.value,
    }
    return values, found.tokens
