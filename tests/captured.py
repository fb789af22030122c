"""The zoo's models with their programs, traced once for all tests of a process."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor, nn

from qpass.capture import Captured, capture
from tests import zoo


@functools.cache
def specimen(name: str) -> tuple[nn.Module, Mapping[str, Tensor], Captured]:
    """A model of the zoo, its inputs and its program: shared, so nobody may change them."""
    entry = zoo.specimen(name)
    model, inputs = entry.build(0), entry.inputs()
    return model, inputs, capture(model, inputs)
