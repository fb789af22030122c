"""Do stretches of a program hand on the gradients of the whole?"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qpass.analyze import find_matmuls
from qpass.calibrate import backward
from qpass.calibrate.backward import gradients_at, stretches
from qpass.capture import capture
from qpass.ir import Program
from tests.captured import folded

NAMES = ("llama", "gpt2", "bert", "gemma3", "vision", "nano_gpt")


def total(_at: int, made: Sequence[object]) -> Tensor:
    """A form in which no output is a mere sum."""
    floats = [m for m in made if isinstance(m, Tensor) and m.is_floating_point()]
    return torch.stack([(m.double().sin() * 3).sum() for m in floats]).sum()


def found(program: Program, batches: list[tuple[object, ...]]) -> dict[str, list[Tensor]]:
    gradients: dict[str, list[Tensor]] = {}
    for name, grad in gradients_at(
        program, [m.node for m in find_matmuls(program)], batches, total
    ):
        gradients.setdefault(name, []).append(grad)
    return gradients


@pytest.mark.parametrize("name", NAMES)
def test_stretches_give_the_gradients_of_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, inputs = folded(name).program, folded(name).inputs
    monkeypatch.setattr(backward, "TOGETHER", 10**9)
    whole = found(program, [inputs])
    monkeypatch.setattr(backward, "TOGETHER", 2)
    assert len(stretches(program, list(whole))) > 3
    parts = found(program, [inputs])
    assert parts.keys() == whole.keys()
    assert any(bool(g.any()) for (g,) in whole.values())
    for product, (want,) in whole.items():
        (got,) = parts[product]
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max() + 1))


def test_gradients_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    monkeypatch.setattr(backward, "TOGETHER", 1)
    batches = [(torch.randn(rows, 4),) for rows in (3, 5)]
    program = capture(model, batches[0]).program
    names = [m.node for m in find_matmuls(program)]
    got = found(program, batches)
    for at, (x,) in enumerate(batches):
        values = []
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                values.append(x)
        want = torch.autograd.grad(total(at, [x]), values)
        for name, value in zip(names, want, strict=True):
            assert torch.allclose(got[name][at], value, atol=1e-6)
