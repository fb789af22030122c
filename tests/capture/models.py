"""Tiny modules, and programs before and after their idioms are named, for this folder's tests."""

from collections.abc import Callable

import torch
from torch import nn

from qpass.capture.export import capture
from qpass.capture.raising import raise_idioms
from qpass.ir import Program

# float64 sums of some dozen products, in another order
REAL = 1e-12


class Apply(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object) -> object:
        return self.function(*args)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in evaluation mode with no parameter or buffer left at a neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator) + 0.3)
    return model.eval()


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operators(program: Program) -> list[str]:
    """The operators a program calls, in order, without their overloads."""
    calls = (n.target for n in program.graph.nodes if n.op == "call_function")
    return [str(target).removesuffix(".default") for target in calls]


def before_and_after(model: nn.Module, inputs: object, monkeypatch) -> tuple[Program, Program]:
    """The program of `model` before and after idioms are named, from one trace."""
    with monkeypatch.context() as patch:
        patch.setattr("qpass.capture.export.raise_idioms", lambda program: [])
        before = capture(model, inputs).program
    after = before.clone()
    raise_idioms(after)
    return before, after


def assert_same(program: Program, reference: Program, *inputs: torch.Tensor) -> None:
    """Both programs agree over the reals, as far as float64 can tell."""
    for got, want in zip(
        program.run(*inputs, widen=True), reference.run(*inputs, widen=True), strict=True
    ):
        assert (got - want).abs().max() <= REAL * want.abs().max()
