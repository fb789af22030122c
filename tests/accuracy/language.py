"""A language model: perplexity and KL on text that it was not calibrated on."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from qpass.hf.pretrained import load_model, token_ids
from qpass.verify import windows
from tests.accuracy.grid import METHODS, SETTINGS
from tests.accuracy.task import Task, predictions_lost
from tests.data.fetch import MODEL

TEXTS = Path(__file__).parents[1] / "data"
LENGTH = 512
TOKENS = 40_000  # at the end of the evaluation text


@functools.cache
def evaluation(every: int) -> tuple[Tensor, ...]:
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


@functools.cache
def held(count: int = 6) -> tuple[Tensor, ...]:
    """Windows of the calibration text between those that are calibrated on."""
    ids = token_ids(MODEL, (TEXTS / "sotu_calibration.txt").read_text(encoding="utf-8"))
    every = windows(ids, LENGTH)
    used = torch.cat(calibration(TASK.amount))
    free = [w for w in every if not (w == used).all(1).any()]
    return torch.stack(free)[:: -(-len(free) // count)].split(1)


def judged(model: nn.Module, reference: nn.Module) -> float:
    return predictions_lost(model, reference, held())[0]["KL"]


def lost(model: nn.Module, reference: nn.Module, every: int) -> tuple[dict[str, float], int]:
    return predictions_lost(model, reference, evaluation(every))


TASK = Task(
    read=lambda: load_model(MODEL),
    calibration=calibration,
    sample=lambda: calibration(4)[0][:1, :16],
    lost=lost,
    judged=judged,
    amount=16,
    every=6,
    seeds=3,
    settings=tuple(SETTINGS),
    methods=tuple(METHODS),
)
