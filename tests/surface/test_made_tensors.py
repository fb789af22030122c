"""Does a model that makes a table anew, in longer calls or when it is loaded, stay what it was?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.verify.exact import largest_error
from tests.architectures.catalogue import architecture
from tests.architectures.models import outputs, subject
from tests.zoo import randomise

WIDTH, EXACT, EAGER = 12, 1e-12, 2e-5


class Grows(nn.Module):
    """Adds positions from a table that it makes longer when a call needs it."""

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, WIDTH), nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.last, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 5)
        if buffer:
            self.register_buffer("positions", self.made(8), persistent=False)
        else:
            self.positions = self.made(8)

    def made(self, rows: int) -> Tensor:
        steps = torch.arange(rows * WIDTH, dtype=torch.float64).reshape(rows, WIDTH)
        return (steps * 0.37).sin()

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.shape[1]
        if rows > self.positions.shape[0]:
            self.positions = self.made(2 * rows)
        x = self.table(ids) + self.positions[:rows]
        return self.head(self.last(x + self.down(self.up(self.norm(x)).relu())))


def ids(rows: int) -> Tensor:
    return torch.randint(9, (2, rows), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("buffer", [True, False])
@torch.no_grad()
def test_a_table_that_grows_stays_the_same_table(*, buffer: bool) -> None:
    model = Grows(buffer=buffer).double()
    randomise(model, 0)
    model.eval()
    want = [model(ids(rows)) for rows in (5, 3)]
    report = qpass.rotate(model, ids(5))
    assert report.coverage.declined == 0
    for rows, before in zip((5, 3), want, strict=True):
        assert largest_error([model(ids(rows))], [before]) < EXACT
    other = Grows(buffer=buffer).double().eval()
    randomise(other, 0)
    assert largest_error([model(ids(20))], [other(ids(20))]) < EXACT


@pytest.mark.parametrize("name", ["m2m_100", "wav2vec2-conformer"])
def test_a_table_that_loading_makes_is_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    tiny = subject(architecture(name))
    qpass.rotate(tiny.model, tiny.first)
    tiny.model.save_pretrained(tmp_path)
    how = tiny.model.config._attn_implementation
    read = type(tiny.model).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation=how)
    assert largest_error(outputs(read.eval(), tiny.first), tiny.outputs[0]) < EAGER
