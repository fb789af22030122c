"""What a changed model of transformers does with its library's own ways in and out."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import nn

from qpass.errors import StateError
from qpass.targets.guard import enter_by, is_guarded


def settle(model: nn.Module) -> None:
    """Teach a model that qpass changed what its keywords stand for, and refuse what would break it.

    Does nothing for a model that is not of transformers or whose values did not change.
    """
    if not is_pretrained(model) or not is_guarded(model):
        return
    owner = cast("Any", model)
    enter_by(model, "inputs_embeds", owner.get_input_embeddings())
    if owner.config.is_encoder_decoder:
        enter_by(model, "encoder_outputs", owner.get_encoder())
        enter_by(model, "decoder_inputs_embeds", owner.get_decoder().get_input_embeddings())
    owner.resize_token_embeddings = _refuse_resize


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is of transformers, which it cannot be before transformers was imported."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _refuse_resize(*_: object, **__: object) -> None:
    raise StateError(
        "the embedding was changed by qpass, and new rows would be in another basis\n"
        "  resize the float model first, then rotate or quantize it"
    )
