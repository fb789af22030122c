"""Do gains that stand by themselves move into what reads them, and only where they may?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qpass
from qpass.capture import capture
from qpass.ir import run_passes
from qpass.transform import FoldNorms
from qpass.verify.exact import ExactCheck
from tests.zoo import randomise

WIDTH = 12
EXACT = 1e-12


class Scaled(nn.Module):
    """A norm in a way of its own, with a gain behind it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.gain, self.how = nn.Parameter(torch.ones(WIDTH)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "normalize":
            return functional.normalize(x, dim=-1) * self.gain
        if self.how == "length":
            return (1 + self.gain) * (x / (x.norm(dim=-1, keepdim=True) * 0.3 + 1e-6))
        return x * self.gain


class Net(nn.Module):
    """The stream passes layers that read what is scaled, and `shown` maybe returns it."""

    def __init__(self, how: str, *, shown: bool = False) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, WIDTH), Scaled(how)
        self.a, self.b = nn.Linear(WIDTH, 10, bias=False), nn.Linear(WIDTH, 10)
        self.down, self.head = nn.Linear(10, WIDTH), nn.Linear(WIDTH, 7)
        self.shown = shown

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.norm(x)
        x = x + self.down(functional.silu(self.a(y)) * self.b(y))
        return torch.cat((self.head(x), y), -1) if self.shown else self.head(x)


def net(how: str, *, shown: bool = False) -> Net:
    made = Net(how, shown=shown).double()
    randomise(made, 0)
    return made.eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["normalize", "length", "alone"])
@torch.no_grad()
def test_a_gain_moves_and_its_values_are_shown_as_they_were(how: str) -> None:
    model, ref = net(how), net(how)
    captured = capture(model, ids(2, 5))
    check = ExactCheck(captured.flatten(ids(2, 5)))
    folded, notes = run_passes(captured.program, [FoldNorms()], check)
    assert [note.where for note in notes if note.done] == ["norm"]
    assert check.error(captured.program, folded) < EXACT
    report = qpass.rotate(model, ids(2, 5))
    assert report.plan.rotated
    seen: list[Tensor] = []
    for one in (model, ref):
        with one.norm.register_forward_hook(lambda m, args, out: seen.append(out)):
            seen.append(one(ids(3, 4)))
    for got, want in zip(seen[:2], seen[2:], strict=True):
        assert (got - want).abs().max() < EXACT * want.abs().max()


def test_a_gain_whose_product_is_returned_stays() -> None:
    captured = capture(net("normalize", shown=True), ids(2, 5))
    _, notes = run_passes(captured.program, [FoldNorms()])
    assert not [note for note in notes if note.done]
