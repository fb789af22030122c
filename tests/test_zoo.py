"""Is every model of the zoo random in all its parts, and is it what its entry says?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO, Specimen, randomise, specimen, tokens


@pytest.fixture(params=ZOO, ids=lambda s: s.name)
def entry(request) -> Specimen:
    return request.param


def first_output(model: nn.Module, inputs) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def test_nothing_is_neutral(entry: Specimen) -> None:
    for name, parameter in entry.build(0).named_parameters():
        assert parameter.dtype == torch.float64, name
        assert parameter.unique().numel() == parameter.numel(), f"{name} repeats a value"


def test_output_is_finite_and_depends_on_the_input(entry: Specimen) -> None:
    model = entry.build(0)
    inputs = dict(entry.inputs())
    out = first_output(model, inputs)
    assert out.isfinite().all()
    assert 1e-2 < out.std() < 1e2
    rows = {name: value.flip(0) for name, value in inputs.items()}
    torch.testing.assert_close(first_output(model, rows), out.flip(0), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(out, out.flip(0))


def test_same_seed_same_model_and_only_then(entry: Specimen) -> None:
    one, same, other = (next(entry.build(seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_names_are_unique_and_each_says_what_it_adds() -> None:
    assert len({s.name for s in ZOO}) == len(ZOO)
    assert len({s.adds for s in ZOO}) == len(ZOO)


def test_tied_and_untied() -> None:
    tied, untied = specimen("llama_tied").build(0), specimen("llama").build(0)
    for model, expected in ((tied, True), (untied, False)):
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (table is head) == expected


def test_the_sliding_window_bites() -> None:
    model = specimen("mistral").build(0)
    ids = tokens(batch=1, length=9)
    changed = ids.clone()
    changed[0, 0] = 3 + (ids[0, 0] - 2) % 61
    one, other = (first_output(model, {"input_ids": i}) for i in (ids, changed))
    assert not torch.allclose(one[0, 3], other[0, 3])
    # two layers see at most 2 * (window - 1) tokens back
    torch.testing.assert_close(one[0, 8], other[0, 8])


def test_buffers_that_are_stored_are_randomised() -> None:
    model = nn.Sequential(nn.BatchNorm1d(5))
    randomise(model, 0)
    assert not torch.equal(model[0].running_mean, torch.zeros(5))
    assert (model[0].running_var > 0).all()
    assert not torch.equal(model[0].running_var, torch.ones(5))
