"""The models that engines are timed on, and what they read."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from qpass.hf.pretrained import token_ids
from tests.data.fetch import MODEL
from tests.peers.environments import WHERE
from tests.results import ROOT

# of the factors of a rescaled model's channels
SPREAD = 0.05
TEXT = ROOT / "tests" / "data" / "sotu_evaluation.txt"


@dataclass(frozen=True)
class Model:
    """A real model, or the shape of one with random weights, whose answers say nothing."""

    real: bool
    config: LlamaConfig | None = None
    eight_bits: bool = False  # only rows of so many are measured


MODELS = {
    "SmolLM2-135M": Model(real=True),
    # weights that lie on a grid of few points lose nothing on a finer one; these lie on none
    "SmolLM2-135M rescaled": Model(real=True, eight_bits=True),
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
    asked = MODELS[name]
    if asked.real and not asked.eight_bits:
        return MODEL
    where = WHERE / "models" / name / "checkpoint"
    if not (where / "config.json").exists():
        torch.manual_seed(0)
        if asked.config is None:
            model = _rescaled(AutoModelForCausalLM.from_pretrained(MODEL))
        else:
            model = AutoModelForCausalLM.from_config(asked.config, dtype=torch.bfloat16)
        model.save_pretrained(where)
        # exporters do not go without a tokenizer
        for file in MODEL.glob("tokenizer*"):
            shutil.copy(file, where)
    return where


@torch.no_grad()
def _rescaled(model: nn.Module) -> nn.Module:
    """The model with every channel of its layers' products scaled by about one."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in ends:
            module.weight.mul_(1 + SPREAD * torch.randn(len(module.weight), 1))
    return model


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
