"""Make `tests/data/checkpoint_v<n>`: this version of the format, kept for later ones to read.

    python -m tests.data.make_checkpoint

A tiny tied language model of transformers, rotated with transforms that run with it and quantized
to 4-bit weights, beside the tokens it was run on and what it returned. It is made once for each
version and stays: later versions must go on reading it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

import qpass
from qpass.plan import Recipe
from qpass.targets.record import FORMAT_VERSION
from tests.zoo import tiny, tokens


def where(version: int) -> Path:
    """The directory of a version."""
    return Path(__file__).parent / f"checkpoint_v{version}"


def build() -> nn.Module:
    """The model before it is changed, with parameters that a seed decides."""
    config = hf.LlamaConfig(
        vocab_size=64,
        max_position_embeddings=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return tiny(config, dtype=torch.float32)


def outputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What the checkpoint has to give: logits, and the hidden states of the model as it was."""
    with torch.no_grad():
        found = model(input_ids=ids, output_hidden_states=True)
    states = {f"hidden_state.{i}": state for i, state in enumerate(found.hidden_states)}
    return {"logits": found.logits, **states}


def main() -> None:
    """Write the directory anew."""
    folder = where(FORMAT_VERSION)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    model, ids = build(), tokens()
    recipe = Recipe.read({"recipe": "w4a8", "rotation": "on"})
    qpass.quantize(model, recipe, inputs={"input_ids": ids})
    qpass.save(model, folder / "model")
    made = {name: value.clone() for name, value in outputs(model, ids).items()}
    save_file({"input_ids": ids, **made}, folder / "outputs.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
