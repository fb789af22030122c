"""Do norms keep their gains and biases where a module could not hold what they become?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qpass
from qpass.capture import capture
from qpass.ir import run_passes
from qpass.transform import FoldNorms
from tests.zoo import randomise

WIDTH, ROWS = 12, 20
LIMIT = 1e-12


class Deaf(nn.Linear):
    """A linear layer that would not add a bias."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight)


class Spelled(nn.Linear):
    """A linear layer with a code of its own, which adds a bias if there is one."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Reader(nn.Module):
    """A residual block whose LayerNorm is read by `layer` in the way `read` says."""

    def __init__(self, layer: nn.Module, read) -> None:
        super().__init__()
        self.norm, self.layer, self.read = nn.LayerNorm(WIDTH), layer, read

    def forward(self, x: Tensor) -> Tensor:
        return x + self.read(self.layer, self.norm(x))


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(ROWS, WIDTH), block
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, ROWS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.table(ids))))


class Twice(nn.Module):
    """One layer reads two norms; `same` says that the two are one."""

    def __init__(self, *, same: bool) -> None:
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)
        self.second = self.first if same else nn.LayerNorm(WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer(self.first(x))
        return x + self.layer(self.second(x))


class Pair(nn.Module):
    """Two matrices in one module, whose products are of different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Parameter(torch.empty(WIDTH, 30))
        self.down = nn.Parameter(torch.empty(30, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.norm(x) @ self.up).relu() @ self.down


def test_a_module_that_holds_two_matrices_is_rotated() -> None:
    model = Net(Pair()).double()
    randomise(model, 0)
    ids = torch.arange(2 * 5).reshape(2, 5)
    want, up = model.eval()(ids), model.block.up.detach().clone()
    report = qpass.rotate(model, ids)
    assert report.plan.rotated
    assert not torch.equal(model.block.up, up)
    assert (model(ids) - want).abs().max() <= LIMIT * want.abs().max()


class TwoStreams(nn.Module):
    """Two stacks share one table, or one layer, and only one of them may turn."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = (nn.ModuleDict() for _ in range(2))
        for stack in (self.first, self.second):
            # the same module under another name
            stack["table"] = self.table if shared == "table" else nn.Embedding(ROWS, WIDTH)
            stack["layer"] = self.layer if shared == "layer" else nn.Linear(WIDTH, WIDTH)
            stack["norm"] = nn.RMSNorm(WIDTH)
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, ROWS)

    def stream(self, stack: nn.ModuleDict, ids: Tensor) -> Tensor:
        x = stack["table"](ids)
        return x + stack["layer"](stack["norm"](x))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = self.stream(self.second, ids)
        return self.stream(self.first, ids), self.head(self.norm(y))


@pytest.mark.parametrize("shared", ["table", "layer", "nothing"])
def test_a_module_of_two_names_changes_for_both_or_not_at_all(shared: str) -> None:
    model = TwoStreams(shared).double()
    randomise(model, 0)
    ids = torch.arange(2 * 5).reshape(2, 5)
    want = model.eval()(ids)
    report = qpass.rotate(model, ids)
    for got, kept in zip(model(ids), want, strict=True):
        assert (got - kept).abs().max() <= LIMIT * kept.abs().max()
    assert bool(report.plan.rotated) is (shared == "nothing")


def _linear(**options) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False, **options)


BLOCKS = {
    "called": (lambda: Reader(_linear(), lambda m, y: m(y)), True),
    "spelled": (lambda: Reader(Spelled(WIDTH, WIDTH, bias=False), lambda m, y: m(y)), True),
    "deaf": (lambda: Reader(Deaf(WIDTH, WIDTH, bias=False), lambda m, y: m(y)), False),
    "weight_alone": (
        lambda: Reader(_linear(), lambda m, y: functional.linear(y, m.weight)),
        False,
    ),
    "attention": (
        lambda: Reader(
            nn.MultiheadAttention(WIDTH, 3, bias=False, batch_first=True),
            lambda m, y: m(y, y, y, need_weights=False)[0],
        ),
        False,
    ),
    "twice_one_norm": (lambda: Twice(same=True), True),
    "twice_two_norms": (lambda: Twice(same=False), False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_norm_folds_where_its_readers_can_hold_it(name: str) -> None:
    build, folds = BLOCKS[name]
    model = Net(build()).double()
    randomise(model, 0)
    ids = torch.arange(2 * 5).reshape(2, 5)
    want = model.eval()(ids)
    bias = next(m for m in model.block.modules() if isinstance(m, nn.LayerNorm)).bias
    report = qpass.rotate(model, ids)
    assert (model(ids) - want).abs().max() <= LIMIT * want.abs().max()
    kept = next(m for m in model.block.modules() if isinstance(m, nn.LayerNorm)).bias
    assert bool(kept.eq(0).all()) is folds
    assert bool(kept.eq(bias).all()) is not folds
    assert len(report.plan.rotated) + len(report.plan.online) > 0


class Weighed(nn.Module):
    """The entries of what a norm makes are multiplied before a layer reads them."""

    def __init__(self, weigh) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.weigh = nn.Linear(WIDTH, WIDTH), weigh

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.weigh(self.norm(x), self.gate(x)))


@pytest.mark.parametrize(
    ("weigh", "folds"),
    [
        (lambda y, gate: y * gate.sigmoid(), True),
        (lambda y, gate: gate.tanh() * y, True),
        (lambda y, gate: y / gate.exp(), True),
        (lambda y, gate: y * y.sigmoid(), False),
        (lambda y, gate: y * y, False),
    ],
)
def test_a_gain_folds_through_what_its_norm_is_multiplied_with(weigh, *, folds: bool) -> None:
    model = Net(Weighed(weigh)).double()
    randomise(model, 0)
    ids = torch.arange(6)[None]
    captured = capture(model, ids)
    folded, notes = run_passes(captured.program, [FoldNorms()])
    (want,), (got,) = (p.run(*captured.flatten(ids)) for p in (captured.program, folded))
    assert isinstance(want, Tensor)
    assert (got - want).abs().max() <= LIMIT * want.abs().max()
    assert {note.where: note.done for note in notes}["block.norm"] is folds
