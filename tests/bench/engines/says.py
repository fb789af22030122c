"""What a model says comes next, and how far that is from what the float model says."""

# t tokens, v entries of the vocabulary

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.bench.engines.process import Process


@dataclass(frozen=True)
class Lost:
    """How often the likeliest token is the float model's: after prompts, and token by token.

    Token by token also the mean divergence from it, and by what the perplexity is multiplied.
    """

    at_once: float
    agreed: float
    kl: float
    perplexity: float


@dataclass(frozen=True, eq=False)
class Says:
    """The likeliest token after each of several prompts; after `text` scores `[t, v]`."""

    prompts: Sequence[int]
    text: Sequence[int]
    scores_tv: Tensor

    @classmethod
    def of(cls, process: Process, text: list[int], prompt: int, prompts: int) -> Says:
        """Ask after `prompts` pieces of a text, and after each token behind the first of them."""
        starts = range(0, len(text) - prompt, (len(text) - prompt) // prompts)[:prompts]
        asked = ({"prompts": [text[at : at + prompt]], "tokens": 0} for at in starts)
        read = [process.ask(each)["next"][0] for each in asked]
        with tempfile.TemporaryDirectory() as folder:
            save = Path(folder) / "scores.npy"
            process.ask({"prompt": text[:prompt], "follow": text[prompt:], "save": str(save)})
            scores_tv = torch.from_numpy(np.load(save))
        return cls(read, text[prompt:], scores_tv)

    def lost(self, want: Says) -> Lost:
        """How far this is from what the float model says."""
        log_tv, want_tv = self.scores_tv.log_softmax(-1), want.scores_tv.log_softmax(-1)
        kl = (want_tv.exp() * (want_tv - log_tv)).sum(-1).mean()
        same = zip(self.prompts, want.prompts, strict=True)
        return Lost(
            statistics.fmean(a == b for a, b in same),
            float((log_tv.argmax(-1) == want_tv.argmax(-1)).double().mean()),
            float(kl),
            math.exp(want._likelihood(want_tv) - self._likelihood(log_tv)),
        )

    def _likelihood(self, log_tv: Tensor) -> float:
        """The mean logarithm of what the tokens that follow were given."""
        follow_t1 = torch.tensor(self.text).unsqueeze(1)
        return float(log_tv[:-1].gather(-1, follow_t1).mean())
