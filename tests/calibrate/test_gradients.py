"""Do the gradients say what an error at a product's output costs the model?"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.analyze import find_matmuls
from qpass.calibrate import gradients
from qpass.calibrate.gradients import costs
from qpass.capture import capture
from qpass.errors import BadInput
from qpass.ir import Program


def layers(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for one, other in itertools.pairwise(widths):
        parts += [nn.Linear(one, other), nn.Tanh()]
    return nn.Sequential(*parts[:-1]).double()


def inputs(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def test_a_hessian_is_that_of_the_squared_error() -> None:
    # 6 outputs, no more than they read: numbers, and no scores of choices
    model = layers(5, 7, 8, 6)
    x = inputs(4000, 5, 1)
    program = capture(model, x).program
    first = find_matmuls(program)[0]
    (found,) = costs(program, (), {first.node: "first"}, [(x,)], 0).sums.values()
    y = model[0](x).detach()
    rest = nn.Sequential(*model[1:])
    jacobian = torch.func.vmap(torch.func.jacrev(rest))(y)
    size = model(x).detach().square().mean()
    want = torch.einsum("mon,mop->np", jacobian, jacobian).detach() / size
    assert (found - want).norm() < 0.1 * want.norm()


def test_a_hessian_is_that_of_the_divergence_of_scores() -> None:
    model = layers(5, 6, 40)
    x = inputs(6000, 5, 2)
    program = capture(model, x).program
    head = find_matmuls(program)[-1]
    (found,) = costs(program, (), {head.node: "head"}, [(x,)], 0).sums.values()
    p = model(x).detach().softmax(-1)
    want = torch.diag(p.sum(0)) - p.mT @ p
    assert (found - want).norm() < 0.1 * want.norm()


def test_rows_that_do_not_matter_cost_nothing() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:3]

    x = torch.randn(8, 4)
    program = capture(First(), x).program
    name = find_matmuls(program)[0].node
    (rows,) = costs(program, [name], {}, [(x,)], 0).rows[name]
    assert (rows[:3] > 0).all()
    assert (rows[3:] == 0).all()


def test_one_pass_measures_all(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[set[str]] = []
    plain = gradients.gradients_at

    def counted(program: Program, wanted: Collection[str], *rest: object) -> object:
        passes.append(set(wanted))
        return plain(program, wanted, *rest)

    monkeypatch.setattr(gradients, "gradients_at", counted)
    recipe = {"weight": {"format": "int4"}, "rounding": "yaqa", "rotation": "off"}
    qpass.quantize(layers(5, 7, 6), recipe, calibration=[inputs(40, 5, 1)])
    assert len(passes) == 1


def test_outputs_that_nothing_flows_from_are_refused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(-1)

    recipe = {"weight": {"format": "int4"}, "rounding": "yaqa"}
    with pytest.raises(BadInput, match="nothing floating"):
        qpass.quantize(Chosen(), recipe, calibration=[torch.randn(8, 4)])
