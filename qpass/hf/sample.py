"""Which calls stand for a model: the user's, or one that transformers can make up."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from qpass.capture.call import Inputs
from qpass.errors import BadInput, expect_instance


def sample_call(model: nn.Module, inputs: Inputs | None) -> Inputs:
    """`inputs`, or where there are none a call that fits a transformers model."""
    expect_instance(nn.Module, "model", model, "a torch.nn.Module")
    if inputs is not None:
        return inputs
    # a model of transformers cannot exist before transformers has been imported
    if "transformers" in sys.modules:
        from qpass.hf.inputs import sample_inputs

        if (made := sample_inputs(model)) is not None:
            return made
    raise BadInput(
        f"inputs are needed: {type(model).__name__} does not say what it takes\n"
        "  pass a tensor, a tuple of arguments or a dict of keyword arguments"
    )


def sample_calls(calibration: Iterable[Inputs] | None) -> list[Inputs]:
    """The batches of calibration data, at least one where any are given."""
    if calibration is None:
        return []
    if isinstance(calibration, Tensor | Mapping | str | bytes):
        raise BadInput(
            f"calibration is one {type(calibration).__name__}, not an iterable of batches; "
            "wrap it in a list"
        )
    expect_instance(Iterable, "calibration", calibration, "an iterable of batches")
    if not (batches := list(calibration)):
        raise BadInput("calibration has no batches; an iterator that was used up gives none")
    return batches


def kept_tokens(batch: Inputs) -> Tensor | None:
    """Which tokens of a call are no padding, or None where that is not said.

    Calls with tokens for an encoder and for a decoder say it of one of them, and which a value
    belongs to is not known.
    """
    if not isinstance(batch, Mapping) or any(str(name).startswith("decoder_") for name in batch):
        return None
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
