"""Does a recorded graph compute what the compiled one does?"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qpass.runtime import tape
from qpass.targets import replay
from tests.targets.replays import CALLS, Caching, Deep, both, equal, row, seeded, watched_runs
from tests.zoo import VOCABULARY, ZOO, Specimen

pytestmark = pytest.mark.skipif(not tape.available(), reason="there are no compiled kernels")


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watched_runs(monkeypatch)


ENDS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda x: x,
    "transposed": lambda x: x.mT,
    "two": lambda x: (x.exp(), x.sum(-1)),
    "a number": lambda x: (x, 3),
    "loops": lambda x: functional.softmax(x.sigmoid(), -1),
    "sorted": lambda x: torch.sort(x),
    "sums": lambda x: x.cumsum(0),
    "the largest": lambda x: x.topk(3)[0],
    "products": lambda x: (x @ x.mT, torch.linalg.svdvals(x)),
}


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("rows", [1, replay.FEW_ROWS])
def test_results_are_those_of_the_compiled_graph(end: str, rows: int, runs: list[int]) -> None:
    made = seeded(Deep(ENDS[end]))
    recorded, compiled = both(made, recipe="w8a8")
    xs = [row(i, rows) for i in range(CALLS)]
    kept = [recorded(x) for x in xs]
    assert runs
    # results of earlier calls are not written to by later ones
    for x, got in zip(xs, kept, strict=True):
        assert equal(got, compiled(x))


@torch.no_grad()
@pytest.mark.parametrize("specimen", ZOO, ids=lambda s: s.name)
def test_models_compute_the_same_again(
    specimen: Specimen, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "FEW_ROWS", 1 << 10)
    model = specimen.build(0).float()
    compiled = torch.compile(model, backend="qpass", options={"recipe": "w8a8"}, dynamic=False)

    def call(turn: int) -> Tensor:
        given = dict(specimen.inputs())
        for name, value in given.items():
            if "mask" not in name:
                moved = (value + turn) % VOCABULARY if name == "input_ids" else value + turn
                given[name] = moved.to(torch.float32) if value.is_floating_point() else moved
        found = compiled(**given)
        return found if isinstance(found, Tensor) else found[0]

    # as compiled, looked at, and recorded; then again
    want = [call(turn) for turn in range(3)]
    assert not runs
    for turn in (1, 0, 2, 0):
        assert torch.equal(call(turn), want[turn])
    assert len(runs) == 4


@torch.no_grad()
def test_what_the_graph_returns_of_its_inputs(runs: list[int]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = Deep()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, object]:
            return x, x[:, 2:5], self.deep(x)

    recorded, compiled = both(seeded(Both()))
    for i in range(CALLS):
        x = row(i)
        same, part, y = recorded(x)
        assert same.data_ptr() == x.data_ptr()
        assert part.data_ptr() == x[:, 2:].data_ptr()
        assert torch.equal(y, compiled(x)[2])
    assert runs


@torch.no_grad()
def test_sizes_that_dynamo_leaves_open_are_not_recorded(runs: list[int]) -> None:
    class Summing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = Deep()

        def forward(self, x: Tensor, kept: Tensor) -> object:
            return self.deep(x + kept.sum(0, keepdim=True))

    made = seeded(Summing())
    compiled = torch.compile(made, backend="qpass", options={"recipe": "w8a8"}, dynamic=True)
    memory = torch.randn(12 * 16, generator=torch.Generator().manual_seed(0))
    # other sizes and strides in one place
    views = [memory[:96].view(6, 16), memory[:64].view(4, 16), memory.as_strided((5, 16), (32, 1))]
    for kept in (*views, *views, *views):
        want = made(row(0), kept)
        assert isinstance(want, Tensor)
        assert (compiled(row(0), kept) - want).norm() <= 0.05 * want.norm()
    assert not runs


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16-g64"])
def test_caches_are_written(recipe: str, runs: list[int]) -> None:
    made = seeded(Caching())
    recorded, compiled = both(made, recipe=recipe)
    one, other = torch.zeros(8, 16), torch.zeros(8, 16)
    for i in range(8):
        # new tensors for what is short; the cache stays where it is
        ids, at = torch.tensor([i * 3 % 32]), torch.tensor([i])
        assert torch.equal(recorded(ids, at, one), compiled(ids, at, other))
        assert torch.equal(one, other)
    assert runs


@torch.no_grad()
def test_another_cache_is_another_place(runs: list[int]) -> None:
    made = seeded(Caching())
    recorded, compiled = both(made)
    held = []
    for turn in range(4):
        one, other = torch.zeros(8, 16), torch.zeros(8, 16)
        held.append(one)
        for i in range(4):
            ids, at = torch.tensor([turn + i]), torch.tensor([i])
            assert torch.equal(recorded(ids, at, one), compiled(ids, at, other))
        assert torch.equal(one, other)
    assert runs
    assert held[0].any()


@torch.no_grad()
def test_no_argument_is_kept_alive() -> None:
    made = seeded(Caching())
    recorded, _ = both(made)
    cache = torch.zeros(8, 16)
    for i in range(CALLS):
        recorded(torch.tensor([i]), torch.tensor([i]), cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
