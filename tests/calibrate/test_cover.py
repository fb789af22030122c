"""Do the batches that are chosen stand for all of them?"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import qpass
from qpass.calibrate.cover import nearest_subset
from qpass.errors import BadInput
from tests import zoo


def discrepancy(features: Tensor, chosen: list[int]) -> float:
    """The squared maximum mean discrepancy of a few rows from all."""
    scaled = features / features.std(0)
    squares = torch.cdist(scaled, scaled).square()
    kernel = (-squares / squares[squares > 0].median()).exp()
    part = kernel[chosen]
    return float(kernel.mean() - 2 * part.mean() + part[:, chosen].mean())


@pytest.mark.parametrize("seed", range(3))
def test_few_rows_are_nearer_to_all_than_any_other_few(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    chosen = nearest_subset(features, 8)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 8
    others = [torch.randperm(40, generator=generator)[:8].tolist() for _ in range(200)]
    assert discrepancy(features, chosen) < min(discrepancy(features, few) for few in others)


def test_every_kind_has_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([0] * 24 + [1] * 12 + [2] * 4)
    features = 10 * torch.eye(3, dtype=torch.float64)[kinds]
    features += 0.1 * torch.randn(features.shape, generator=generator, dtype=torch.float64)
    chosen = kinds[nearest_subset(features, 10)]
    assert chosen.bincount().tolist() == [6, 3, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "nano_gpt"])
def test_a_model_is_calibrated_on_the_chosen_batches(name: str) -> None:
    model = zoo.specimen(name).build(0).float()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, zoo.VOCABULARY, (12, 9), generator=generator)
    # twelve batches of three texts: one of each stands for all
    pool = [{"input_ids": ids[at % 3].unsqueeze(0)} for at in range(12)]
    few = [{"input_ids": ids[at].unsqueeze(0)} for at in range(3)]
    recipe = {"recipe": "w4a16-g64", "weight": {"block": 16}}
    want = qpass.quantize(copy.deepcopy(model), recipe, calibration=few).state_dict()
    got = qpass.quantize(copy.deepcopy(model), {**recipe, "select": 3}, calibration=pool)
    assert all(torch.equal(value, want[key]) for key, value in got.state_dict().items())


def test_more_than_there_are_is_all() -> None:
    model = zoo.specimen("llama").build(0).float()
    data = [{"input_ids": zoo.tokens()}]
    recipe = {"recipe": "w8a16", "rounding": "gptq"}
    want = qpass.quantize(copy.deepcopy(model), recipe, calibration=data).state_dict()
    got = qpass.quantize(model, {**recipe, "select": 9}, calibration=data).state_dict()
    assert all(torch.equal(value, want[key]) for key, value in got.items())


@pytest.mark.parametrize("select", [-1, 2.5, True, "all"])
def test_what_is_no_number_of_batches_is_refused(select: object) -> None:
    with pytest.raises(BadInput, match="select"):
        qpass.Recipe.read({"recipe": "w8a8", "select": select})
