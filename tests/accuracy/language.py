"""How good a quantized language model is: perplexity and KL on text it was not calibrated on."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qpass
from qpass.hf.pretrained import load_model, token_ids
from qpass.plan import Recipe
from qpass.verify import score_batches, summarize, windows
from tests.data.fetch import MODEL

TEXTS = Path(__file__).parents[1] / "data"
LENGTH = 512
TOKENS = 40_000  # at the end of the evaluation text
EVERY = 6  # of its windows is measured


@dataclass(frozen=True)
class Quality:
    """What was measured, on how much, and how long quantizing took."""

    perplexity: float
    reference: float
    kl: float
    kl_error: float
    agreement: float
    tokens: int
    seconds: float


@functools.cache
def evaluation(every: int = EVERY) -> tuple[Tensor, ...]:
    """Windows `[1, LENGTH]` of the last tokens of the evaluation text."""
    ids = token_ids(MODEL, (TEXTS / "sotu_evaluation.txt").read_text(encoding="utf-8"))
    return windows(ids[-TOKENS:], LENGTH)[::every].split(1)


@functools.cache
def calibration(count: int) -> tuple[Tensor, ...]:
    """`count` windows of another text, spread over all of it, four to a batch."""
    ids = token_ids(MODEL, (TEXTS / "sotu_calibration.txt").read_text(encoding="utf-8"))
    every = windows(ids, LENGTH)
    at = torch.linspace(0, len(every) - 1, min(count, len(every))).round().long()
    return every[at].split(4)


def measured(recipe: Recipe, count: int, evaluated: Sequence[Tensor]) -> Quality:
    """Quantize the model by `recipe` on `count` windows and compare it with the float32 one."""
    model, reference = (load_model(MODEL).float() for _ in range(2))
    start = time.perf_counter()
    qpass.quantize(
        model, recipe, calibration=calibration(count), inputs=calibration(count)[0][:1, :16]
    )
    seconds = time.perf_counter() - start
    scores = [
        score for by_name in score_batches({"": model}, reference, evaluated)
        for score in by_name[""]
    ]  # fmt: skip
    found = summarize(scores, 1, 1)
    return Quality(
        found.perplexity.value,
        found.reference_perplexity.value,
        found.kl.value,
        found.kl.error,
        found.agreement.value,
        found.tokens,
        round(seconds, 1),
    )
