"""Are norms in a way of their own open to rotations, and everything else as it was?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qpass
from qpass.capture import capture
from tests.capture.models import Apply, noise, operators
from tests.zoo import randomise

WIDTH = 12

NORMS = {
    "epsilon_outside": lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3),
    "largest": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True).clamp(min=1e-3)),
    "viewed": lambda x: x / (torch.square(x).mean(-1) + 1e-3).sqrt()[..., None],
    "scaled": lambda x: x * (12 / (x.square().sum(-1, keepdim=True) + 1e-3)) ** 0.5,
    "centred": lambda x: (
        (x - x.mean(-1, keepdim=True)) / (x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
    ),
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "wide": lambda x: (x.float() / (x.float().pow(2).mean(-1, True).sqrt() + 1e-3)).type_as(x),
}


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.table, self.up = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 20)
        self.down, self.head = nn.Linear(20, WIDTH), nn.Linear(WIDTH, 7)
        self.norm, self.gain = norm, nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(functional.gelu(self.up(self.norm(x) * self.gain)))
        return self.head(self.norm(x))


@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_the_stream_of_a_model_with_a_norm_of_its_own_rotates(name):
    model, ref = Net(NORMS[name]).double(), Net(NORMS[name]).double()
    randomise(model, 0)
    randomise(ref, 0)
    ids = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))
    report = qpass.rotate(model, ids)
    assert report.max_error < 1e-12
    assert any(choice.region == "down.weight[0:12]" for choice in report.plan.rotated)
    assert (model(ids) - ref(ids)).abs().max() < (1e-5 if name == "wide" else 1e-12)


def test_sums_of_other_powers_stay():
    program = capture(Apply(lambda x: (x**3).mean(-1) + x.mean(-1)), noise(2, 3)).program
    assert "aten.linalg_vector_norm" not in operators(program)
