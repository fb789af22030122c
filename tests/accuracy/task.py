"""What is measured of a model: a way to read it, data to calibrate with, and what it lost."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

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


class Remembered(nn.Module):
    """A float model that answers what it was asked before: many are compared with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # no child: what is inside is not compared site by site
        self._known: dict[object, object] = {}

    def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
        names = (*range(len(args)), *kwargs)
        asked = zip(names, (*args, *kwargs.values()), strict=True)
        key = tuple((name, sha256(t.contiguous().numpy().tobytes()).digest()) for name, t in asked)
        if key not in self._known:
            self._known[key] = self._model[0](*args, **kwargs)
        return self._known[key]


@functools.cache
def _float(read: Callable[[], nn.Module]) -> nn.Module:
    return Remembered(read().float().eval())


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
        model, reference = self.read().float().eval(), _float(self.read)
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
