"""Are the calls between operators compiled where tokens are written, and nowhere else?"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import CppCompileError

from qpass.targets import inductor, wrapper
from tests.zoo import randomise


class Deep(nn.Module):
    """Two products with a norm in front of each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(self.norm(x))
        return x + self.second(self.norm(x))


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each compilation was asked for C++; two products count as many."""
    asked: list[bool] = []

    def watched(*args: Any, config_patches: dict[str, Any], **rest: Any) -> object:
        asked.append(bool(config_patches.get("cpp_wrapper")))
        return compile_fx(*args, config_patches=config_patches, **rest)

    monkeypatch.setattr(inductor, "compile_fx", watched)
    monkeypatch.setattr(wrapper, "MANY_PRODUCTS", 2)
    return asked


def model() -> Deep:
    made = Deep().eval()
    randomise(made, 0)
    return made


def check(made: Deep, rows: int, *, reduce: bool = True) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"recipe": "w8a8", "reduce_overhead": reduce}
    compiled = torch.compile(made, backend="qpass", options=options, dynamic=False)
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = made(x)
        assert (compiled(x) - want).norm() <= 0.05 * want.norm()
        # values changed in place are read again
        made.first.weight.mul_(-1)
        want = made(x)
        assert (compiled(x) - want).norm() <= 0.05 * want.norm()


def test_few_rows_are_called_from_cpp(settings: list[bool]) -> None:
    check(model(), wrapper.FEW_ROWS)
    assert settings == [True]


def test_nothing_is_called_from_cpp_unasked(settings: list[bool]) -> None:
    check(model(), 1, reduce=False)
    assert settings == [False]


def test_many_rows_are_called_from_python(settings: list[bool]) -> None:
    check(model(), wrapper.FEW_ROWS + 1)
    assert settings == [False]


def test_few_products_are_called_from_python(
    settings: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapper, "MANY_PRODUCTS", 3)
    check(model(), 1)
    assert settings == [False]


def test_what_does_not_compile_as_cpp_runs_from_python(
    settings: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = inductor.compile_fx

    def failing(*args: Any, config_patches: dict[str, Any], **rest: Any) -> object:
        if config_patches.get("cpp_wrapper"):
            settings.append(True)
            raise CppCompileError(["c++"], "no such header")
        return watched(*args, config_patches=config_patches, **rest)

    monkeypatch.setattr(inductor, "compile_fx", failing)
    with caplog.at_level(logging.INFO, logger="qpass"):
        check(model(), 1)
    assert settings == [True, False]
    assert "stay in Python" in caplog.text


def test_weights_are_watched_while_guards_are_not_evaluated() -> None:
    made = model()
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="qpass", options={"recipe": "w8a8"}, dynamic=False)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled(x)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            for change in (made.first.weight.neg_, lambda: replace(made.first)):
                change()
                want = made(x)
                assert (compiled(x) - want).norm() <= 0.05 * want.norm()


def replace(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.flip(0))
