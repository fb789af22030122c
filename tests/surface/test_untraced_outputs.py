"""Is what a model returns only when asked to, and so was not traced, refused?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.errors import Unsupported
from tests.surface.changed import CLOSE, relative
from tests.zoo import randomise


class Showing(nn.Module):
    """Returns more of what is inside when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.norm = nn.RMSNorm(16)
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor, more: str = "") -> object:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        logits = self.head(x)
        return {"": logits, "all": (logits, x), "mean": (logits, x.mean(1))}[more]


def test_outputs_that_nobody_traced_are_refused() -> None:
    model = Showing().double().eval()
    randomise(model, 0)
    ids = torch.arange(8).reshape(2, 4)
    want = model(ids)
    qpass.rotate(model, (ids,))
    assert relative(want, model(ids)) <= CLOSE
    for more in ("all", "mean"):
        with pytest.raises(Unsupported, match="not known"):
            model(ids, more=more)
