"""Which modules are left alone because other code uses what they hold?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qpass
from qpass.targets.layers import QuantizedLinear
from tests.zoo import randomise

WIDTH = 12


class Net(nn.Module):
    """A layer that is called, and whose weight other code uses in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.table = nn.Embedding(9, WIDTH)
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.how = how

    def forward(self, ids):
        x = self.inner(self.table(ids))
        if self.how == "transposed":
            x = x @ self.inner.weight.t()
        elif self.how == "bias":
            x = x + self.inner.bias
        elif self.how == "norm":
            x = x * self.inner.weight.norm()
        elif self.how == "table":
            return x @ self.table.weight.mT
        return self.head(x)


@pytest.mark.parametrize("how", ["transposed", "bias", "norm", "table"])
@torch.no_grad()
def test_a_module_that_others_look_into_stays_what_it_is(how):
    model = Net(how).double()
    randomise(model, 0)
    ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))
    want = model(ids)
    qpass.quantize(model, {"recipe": "w8a8", "rotation": "on"}, inputs=ids)
    assert (model(ids) - want).abs().max() < 0.05 * want.abs().max()
    left = model.table if how == "table" else model.inner
    assert type(left) in (nn.Linear, nn.Embedding)
    assert how == "table" or isinstance(model.head, QuantizedLinear)
