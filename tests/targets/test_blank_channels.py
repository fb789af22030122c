"""Does a blank around a convolution show what code asks a convolution for?"""

from __future__ import annotations

import qpass
from qpass.targets.blank import describe, place
from tests.targets.test_channels import made, turned


def test_a_checkpoint_is_placed_in_models_that_initialise_what_it_lacks() -> None:
    model, x, _ = made("signals")
    qpass.rotate(model, x)
    fresh = made("signals")[0]
    place(fresh, describe(model))
    for path in turned(model):
        blank, before = fresh.get_submodule(path), made("signals")[0].get_submodule(path)
        assert blank.weight.shape == before.weight.shape
        assert blank.bias.shape == before.bias.shape
        assert (blank.kernel_size, blank.groups) == (before.kernel_size, before.groups)
