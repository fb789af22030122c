"""Which call a transformers model takes, when the user does not say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qpass.rotations import Key
from qpass.rotations.counter import uniforms

BATCH, LENGTH = 2, 64


def sample_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Tokens drawn from a fixed stream for a language model, its own dummy call for another.

    `[2, 64]` tokens, the same on every machine; None if `model` is not transformers'.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    vocabulary = model.get_input_embeddings()
    if model.main_input_name != "input_ids" or not isinstance(vocabulary, nn.Embedding):
        return _dummy(model)
    if model.config.is_encoder_decoder:
        return _dummy(model)
    length = min(LENGTH, _positions(model))
    drawn = uniforms(Key("tokens", 0), BATCH * length) * vocabulary.num_embeddings
    return {"input_ids": drawn.to(torch.int64).reshape(BATCH, length)}


def _positions(model: PreTrainedModel) -> int:
    """How long a text the model takes, by whatever name its config has for that."""
    config = model.config.get_text_config(decoder=True)
    name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    return int(config.to_dict().get(name) or LENGTH)


def _dummy(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.dummy_inputs)
