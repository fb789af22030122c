"""Do tokens count by what the outputs make of them?"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.analyze import find_matmuls
from qpass.calibrate.gradients import costs, gradients
from qpass.calibrate.stages import Stage
from qpass.calibrate.tokens import LEAST, token_weights
from qpass.capture import capture
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.ir import Program
from qpass.ops import hadamard
from qpass.rounding import ROUNDINGS, Rounding, Statistic, Stats


class Some(nn.Module):
    """Whose output is that of some rows, each times its own number."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 5)
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return torch.stack([y[i] * f for i, f in enumerate(self.factors)])


def weighed(
    program: Program, batches: list[tuple[Tensor, ...]], kept: list[Tensor | None] | None = None
) -> Mapping[str, list[Tensor]]:
    stages = [Stage(m.value, (m,)) for m in find_matmuls(program)]
    products = [m.node for stage in stages for m in stage.products]
    return token_weights(stages, costs(program, products, {}, batches, 0, kept).rows)


def test_rows_count_by_what_outputs_make_of_them() -> None:
    model, x = Some(1.0, 10.0), torch.randn(4, 6)
    program = capture(model, x).program
    (weights,) = weighed(program, [(x,)]).values()
    (of,) = weights
    assert of.shape == (4,)
    assert of[1] > 20 * of[0]
    assert of[2:].tolist() == pytest.approx([LEAST, LEAST])


def test_weights_have_mean_one_over_all_batches() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    batches = [(torch.randn(rows, 6),) for rows in (8, 3)]
    program = capture(model, batches[0]).program
    for weights in weighed(program, batches).values():
        assert [len(w) for w in weights] == [8, 3]
        assert float(torch.cat(weights).mean()) == pytest.approx(1, abs=LEAST)


def test_outputs_of_padding_count_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 40))
    x = torch.randn(2, 4, 6)
    kept = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    program = capture(model, x).program
    for (weights,) in weighed(program, [(x,)], [kept]).values():
        of = weights.reshape(2, 4)
        assert (of[kept == 0] == LEAST).all()
        assert (of[kept == 1] > LEAST).any()


def test_statistics_weigh_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    hessians: list[Tensor] = []

    class Seen(Rounding):
        name = "seen"
        needs = frozenset({Statistic.HESSIAN})

        def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
            hessians.append(stats[Statistic.HESSIAN])
            return ROUNDINGS["nearest"].round(weight_nk, spec, {})

    ROUNDINGS._load()
    monkeypatch.setitem(ROUNDINGS._items, "seen", Seen())
    x = torch.randn(4, 6)
    recipe = {"weight": {"format": "int8"}, "rounding": "seen", "rotation": "off"}
    for weigh in (True, False):
        qpass.quantize(Some(1.0, 10.0), {**recipe, "weigh_tokens": weigh}, calibration=[x])
    weighed, plain = hessians
    assert torch.allclose(plain, (x.mT @ x).double(), rtol=1e-5)
    # what is left beside the second row is little
    loud = x[1:2].mT @ x[1:2]
    share = float((weighed * loud).sum() / (weighed.norm() * loud.norm()))
    assert share > 0.99


def test_gradients_pass_an_online_transform() -> None:
    class Online(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)
            self.register_buffer("signs", torch.tensor([1.0, -1.0] * 6))
            self.register_buffer("factor", torch.linalg.qr(torch.randn(3, 3))[0])

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            return self.second(hadamard(y, self.signs, self.factor, 4))

    model, x = Online(), torch.randn(5, 6)
    with torch.no_grad():
        program = capture(model, x).program
    assert any(n.target is torch.ops.qpass.hadamard.default for n in program.graph.nodes)
    first, second = (m.node for m in find_matmuls(program))
    found = dict(gradients(program, [first, second], [(x,)], 0))
    y = model.first(x).detach().requires_grad_()
    out = model.second(hadamard(torch.tanh(y), model.signs, model.factor, 4))
    (want,) = torch.autograd.grad(out, y, found[second])
    assert torch.allclose(found[first], want, atol=1e-6)
