"""Do tied weights stay tied where the model's own code asks whether they are?"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import qpass
from qpass.errors import Unsupported
from tests.zoo import randomise, tiny, tokens

WIDTH, ROWS = 12, 20
LIMIT = 1e-12
# norms cast to float32 on the way, whatever the model's own type
EAGER = 1e-5


@dataclass
class Config:
    tie_word_embeddings: bool = True


class Tied(nn.Module):
    """A tied head; `scaled` says that what it reads is scaled because it is tied."""

    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.config, self.scaled = Config(), scaled
        self.table, self.norm = nn.Embedding(ROWS, WIDTH), nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.norm(x + self.drop(self.down(self.up(x).relu())))
        return self.head(y * 0.3 if self.scaled and self.config.tie_word_embeddings else y)


def tied(*, scaled: bool) -> Tied:
    model = Tied(scaled=scaled).double()
    randomise(model, 0)
    return model.eval()


IDS = torch.arange(2 * 5).reshape(2, 5)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_that_asks_stays_tied_and_is_rotated_elsewhere(*, scaled: bool) -> None:
    model = tied(scaled=scaled)
    want = model(IDS)
    # its own mode is no reason: random values would differ from call to call
    report = qpass.rotate(model.train(), IDS)
    assert (model.eval()(IDS) - want).abs().max() <= LIMIT * want.abs().max()
    assert (model.head.weight is model.table.weight) is scaled
    assert model.config.tie_word_embeddings is scaled
    assert report.plan.online
    assert bool(report.plan.rotated) is not scaled


def test_a_model_that_asks_is_quantized_but_for_what_is_tied() -> None:
    model = tied(scaled=True)
    want = model(IDS)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "off"}, inputs=IDS)
    assert model.head.weight is model.table.weight
    assert not isinstance(model.up, nn.Linear)
    assert (model(IDS) - want).abs().max() <= 0.1 * want.abs().max()


def test_a_plan_for_another_model_is_refused_and_nothing_changes() -> None:
    plan = qpass.rotate(tied(scaled=False), IDS).plan
    model = tied(scaled=True)
    before, want = copy.deepcopy(model.state_dict()), model(IDS)
    with pytest.raises(Unsupported, match="not tied"):
        qpass.rotate(model, IDS, plan=plan)
    assert torch.equal(model(IDS), want)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_encoder_with_a_decoder_that_asks() -> None:
    config = hf.UMT5Config(
        vocab_size=64,
        d_model=48,
        d_kv=8,
        d_ff=80,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=6,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    model = tiny(config, kind=hf.AutoModelForSeq2SeqLM)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 5, seed=1)}
    with torch.no_grad():
        want = model(**inputs).logits
        qpass.rotate(model, inputs)
        got = model(**inputs).logits
    assert (got - want).abs().max() <= EAGER * want.abs().max()


def test_a_flag_that_only_a_class_has_is_turned_off() -> None:
    class Said(Config):
        pass

    model = tied(scaled=False)
    del model.config.__dict__["tie_word_embeddings"]
    model.config.__class__ = Said
    assert model.config.tie_word_embeddings
    want = model(IDS)
    qpass.rotate(model, IDS)
    assert (model(IDS) - want).abs().max() <= LIMIT * want.abs().max()
    assert model.config.tie_word_embeddings is (model.head.weight is model.table.weight)
    assert model.head.weight is not model.table.weight
    assert Config.tie_word_embeddings
