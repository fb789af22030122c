"""Are the numbers of a real model what they are known to be?"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpass.hf.pretrained import load_model, token_ids
from qpass.verify import evaluate, windows
from tests.data.fetch import MODEL

TEXT = Path(__file__).parents[1] / "data" / "sotu_evaluation.txt"
WINDOWS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL / "config.json").exists(),
        reason="no real model; `python -m tests.data.fetch` fetches it",
    ),
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model(MODEL)


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    ids = token_ids(MODEL, TEXT.read_text(encoding="utf-8"))
    return list(windows(ids[-512 * WINDOWS :], 512).split(1))


def test_the_float_model_against_itself(model: nn.Module, batches: list[Tensor]) -> None:
    found = evaluate(model, model, batches)
    assert (found.windows, found.tokens, found.positions) == (WINDOWS, 511 * WINDOWS, 512 * WINDOWS)
    assert found.kl.value == 0.0
    # ordinary English prose to a model of this size: far below the vocabulary, far above memorised
    assert found.perplexity is not None
    assert 15 < found.perplexity.value < 45
    # one tied table of 49,152 x 576 and 30 layers, in float32
    assert found.megabytes == pytest.approx(538.06, abs=0.01)


def test_half_precision_is_close_and_half_as_large(model: nn.Module, batches: list[Tensor]) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = evaluate(half, model, batches)
    assert found.megabytes == pytest.approx(found.reference_megabytes / 2)
    # a bfloat16 has 8 bits: measured KL is 3e-4, and rounding once more doubles it
    assert 0 < found.kl.value < 0.002
    assert found.agreement.value > 0.95


def test_a_layer_that_is_skipped_shows(model: nn.Module, batches: list[Tensor]) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.get_parameter("model.layers.10.mlp.down_proj.weight").zero_()
    found = evaluate(damaged, model, batches[:1])
    assert found.kl.value > 0.01
