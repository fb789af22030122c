"""Are the inputs that are made up for a model ones that it takes?"""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from qpass.hf.inputs import sample_inputs
from tests.zoo import ZOO, Specimen


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_the_model_takes_what_is_made_up(entry: Specimen) -> None:
    model = entry.build(0)
    made = sample_inputs(model)
    assert (made is not None) == isinstance(model, PreTrainedModel)
    if made is None:
        return
    with torch.no_grad():
        assert model(**made)[0].isfinite().all()
    again = sample_inputs(model)
    assert again is not None
    assert all(torch.equal(made[name], again[name]) for name in made)
