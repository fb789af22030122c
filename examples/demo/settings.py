"""What is the demo run on?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qpass.hf.pretrained import load_model, token_ids
from qpass.verify import windows

ROOT = Path(__file__).parents[2]
DATA = ROOT / ".data"
TEXTS = ROOT / "tests" / "data"
CALIBRATION_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """Files and sizes; `tail` is how many tokens at the end of the text are used."""

    model: Path
    text: Path
    calibration: Path
    output: Path
    tail: int
    length: int
    windows: int
    new_tokens: int
    repetitions: int

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model as it came."""
        return load_model(self.model).to(dtype)

    def evaluation(self) -> Tensor:
        """`[windows, length]` token ids that are measured."""
        return self._windows(self.text, self.windows)

    def samples(self) -> Tensor:
        """`[CALIBRATION_WINDOWS, length]` token ids of another text."""
        return self._windows(self.calibration, CALIBRATION_WINDOWS)

    def _windows(self, path: Path, count: int) -> Tensor:
        ids = token_ids(self.model, path.read_text(encoding="utf-8"))
        every = windows(ids[-self.tail :], self.length)
        # evenly spaced, so that fewer windows still see all of the text
        return every[torch.linspace(0, len(every) - 1, min(count, len(every))).round().long()]


def read(arguments: Sequence[str]) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--model", type=Path, default=DATA / "smollm2")
    parser.add_argument("--text", type=Path, default=TEXTS / "sotu_evaluation.txt")
    parser.add_argument("--calibration", type=Path, default=TEXTS / "sotu_calibration.txt")
    parser.add_argument("--output", type=Path, default=DATA / "demo")
    parser.add_argument("--tail", type=int, default=40_000, help="tokens of the text to use")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window and a prompt")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    return Settings(**vars(parser.parse_args(arguments)))
