"""What is compiled with and without recordings, and how the two are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpass.runtime import tape
from qpass.targets import replay
from tests.zoo import randomise

# of one graph: as compiled, looked at, recorded, and then run again
CALLS = 6


def watched_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps there were in each call that was run again; two products count as many."""
    torch._dynamo.reset()
    found: list[int] = []
    run = tape.Tape.run

    def watched(self: tape.Tape, begin: int, end: int) -> None:
        if end == len(self):
            found.append(end)
        run(self, begin, end)

    monkeypatch.setattr(tape.Tape, "run", watched)
    monkeypatch.setattr(replay, "MANY_PRODUCTS", 2)
    return found


class Deep(nn.Module):
    """Two products with a norm in front of each, and whatever `end` makes of the sum."""

    def __init__(self, end: Callable[[Tensor], object] = lambda x: x) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.end = end

    def forward(self, x: Tensor) -> object:
        x = x + self.first(self.norm(x))
        return self.end(x + self.second(self.norm(x)))


class Caching(nn.Module):
    """Writes its first product into a cache and sums that, as a model that decodes does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 32)

    def forward(self, ids: Tensor, at: Tensor, cache: Tensor) -> Tensor:
        cache.index_copy_(0, at, self.first(self.table(ids)))
        return self.second(cache.sum(0, keepdim=True))


def seeded(module: nn.Module) -> Any:
    made = module.eval()
    randomise(made, 0)
    return made


def both(made: nn.Module, **more: Any) -> tuple[Any, Any]:
    """The model compiled with and without recordings."""
    options = {"recipe": "w8a8", **more}
    plain = {**options, "reduce_overhead": False}
    return (
        torch.compile(made, backend="qpass", options=options),
        torch.compile(made, backend="qpass", options=plain),
    )


def row(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def equal(got: object, want: object) -> bool:
    if isinstance(want, Tensor):
        return isinstance(got, Tensor) and torch.equal(got, want) and got.stride() == want.stride()
    if isinstance(want, tuple | list):
        assert isinstance(got, tuple | list)
        return len(got) == len(want) and all(map(equal, got, want))
    return got == want
