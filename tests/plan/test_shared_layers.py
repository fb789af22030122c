"""Do layers that are called several times turn alike in all calls, or not at all?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from tests.zoo import randomise

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Its values turn, unless something looks at them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, bounded: bool) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        v = v.tanh() if bounded else v
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Shared(nn.Module):
    def __init__(self, bounded: tuple[bool, ...]) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        for bounded in self.bounded:
            x = self.norm(x + self.attention(x, bounded=bounded))
        return x


@pytest.mark.parametrize("bounded", [(False, False, False), (False, True), (True, True)])
def test_calls_turn_together(bounded: tuple[bool, ...]) -> None:
    model = Shared(bounded).double().eval()
    randomise(model, 0)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    want = model(x)
    report = qpass.rotate(model, x)
    assert (model(x) - want).abs().max() <= 1e-12 * want.abs().max()
    values = [r for r in report.plan.rotated if "value.weight" in r.region]
    assert len(values) == (0 if any(bounded) else len(bounded))
    assert len({r.transform for r in values}) <= 1
    refused = [d.why for d in report.plan.declined if "used twice" in d.why]
    assert bool(refused) is (bounded == (False, True))
