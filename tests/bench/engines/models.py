"""The models that engines are timed on, and what they read."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qpass.hf.pretrained import token_ids
from tests.data.fetch import MODEL
from tests.peers.environments import WHERE
from tests.results import ROOT

TEXT = ROOT / "tests" / "data" / "sotu_evaluation.txt"


@dataclass(frozen=True)
class Model:
    """A real model, or the shape of one with random weights, whose answers say nothing."""

    real: bool
    config: LlamaConfig | None = None


MODELS = {
    "SmolLM2-135M": Model(real=True),
    "1.1B": Model(
        real=False,
        config=LlamaConfig(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=4096,
            dtype="bfloat16",
        ),
    ),
}


def checkpoint(name: str) -> Path:
    """The directory of a model, made when it is first asked for."""
    config = MODELS[name].config
    if config is None:
        return MODEL
    where = WHERE / "models" / name / "checkpoint"
    if not (where / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(where)
        # exporters do not go without a tokenizer
        for file in MODEL.glob("tokenizer*"):
            shutil.copy(file, where)
    return where


@functools.cache
def text(name: str, length: int) -> list[int]:
    """So many tokens that the model knows: of a text, where it was trained on texts."""
    config = MODELS[name].config
    if config is None:
        # a few characters to a token; all of the text would take seconds
        start = TEXT.read_text(encoding="utf-8")[: 16 * length]
        return token_ids(MODEL, start)[:length].tolist()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (length,), generator=generator).tolist()
