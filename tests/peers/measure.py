"""What a tool's model lost: run in the tool's environment, so on torch and transformers alone."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Given:
    """A model's directory and the tokens that every tool is given: `[windows, length]`."""

    model: Path
    calibration: Tensor
    evaluation: Tensor

    def read(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()


Quantize = Callable[[Given], tuple[nn.Module, str]]


def main(settings: Mapping[str, Quantize]) -> None:
    """Quantize by the setting named on the command line, then print a line of JSON.

    Each of `settings` returns a model and, in words, how it was made.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("setting")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if asked.list:
        print(json.dumps(list(settings)))  # noqa: T201
        return
    tokens = load_file(asked.tokens)
    given = Given(asked.model, tokens["calibration"], tokens["evaluation"])
    torch.manual_seed(0)
    start = time.perf_counter()
    model, how = settings[asked.setting](given)
    seconds = time.perf_counter() - start
    found = lost(logits_of(model), logits_of(given.read()), given.evaluation)
    print("\n" + json.dumps({**found, "seconds": round(seconds, 1), "how": how}))  # noqa: T201


def logits_of(model: nn.Module) -> Logits:
    def run(ids: Tensor) -> Tensor:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return (found["logits"] if isinstance(found, Mapping) else found[0]).float()

    return run


@torch.no_grad()
def lost(model: Logits, reference: Logits, windows: Tensor) -> dict[str, float]:
    """KL divergence from `reference`, perplexity and top-1 agreement where a token follows."""
    divergence, surprise, surprise_reference, agreed, count = 0.0, 0.0, 0.0, 0, 0
    for window in windows.split(1):
        p, q = (f(window)[0, :-1].log_softmax(-1) for f in (reference, model))
        follows = window[0, 1:, None]
        divergence += float((p.exp() * (p - q)).sum())
        surprise -= float(q.gather(1, follows).sum())
        surprise_reference -= float(p.gather(1, follows).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(follows)
    return {
        "KL": divergence / count,
        "perplexity": float(torch.tensor(surprise / count).exp()),
        "float": float(torch.tensor(surprise_reference / count).exp()),
        "top-1": agreed / count,
        "tokens": count,
    }
