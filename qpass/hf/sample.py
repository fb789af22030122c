"""Which call stands for a model: the user's, or one that transformers can make up."""

from __future__ import annotations

import sys

from torch import nn

from qpass.capture.call import Inputs
from qpass.errors import BadInput


def sample_call(model: nn.Module, inputs: Inputs | None) -> Inputs:
    """`inputs`, or where there are none a call that fits a transformers model."""
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
