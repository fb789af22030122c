"""A model quantized one way, and many of them measured side by side."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from tests.accuracy import images, language, sentences, speech
from tests.accuracy.grid import recipe
from tests.accuracy.task import Measured

TASKS = {
    "smollm2": language.TASK,
    "minilm": sentences.TASK,
    "dinov2": images.TASK,
    "whisper": speech.TASK,
}


@dataclass(frozen=True)
class Row:
    """A model quantized one way, measured with one seed."""

    model: str
    setting: str
    method: str
    seed: int
    amount: int
    every: int

    @property
    def name(self) -> str:
        """What its result is kept under."""
        return (
            f"{self.model}, {self.setting}, {self.method}, seed {self.seed}, "
            f"{self.amount} samples, every {self.every}"
        )

    def measured(self) -> Measured:
        found = recipe(self.setting, self.method, self.seed)
        return TASKS[self.model].measured(found, self.amount, self.every)


def measure(rows: Sequence[Row], jobs: int, deadline: float) -> Iterator[tuple[Row, Measured]]:
    """Rows as they are done, `jobs` at a time, each of which has its part of the processors.

    Rows of few threads side by side take less time than rows of many threads one after another.
    """
    if not rows:
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,))
    try:
        asked = {pool.submit(_measured_before, row, deadline): row for row in rows}
        for done in as_completed(asked):
            if (found := done.result()) is not None:
                yield asked[done], found
    finally:
        pool.shutdown(cancel_futures=True)


def _measured_before(row: Row, deadline: float) -> Measured | None:
    return row.measured() if time.time() < deadline else None
