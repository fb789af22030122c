"""Does a recorded graph compute what the compiled one does, whatever changes between calls?"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qpass.runtime import tape
from qpass.targets import recording, replay
from tests.zoo import VOCABULARY, ZOO, Specimen, randomise

pytestmark = pytest.mark.skipif(not tape.available(), reason="there are no compiled kernels")

CALLS = 6


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
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


@torch.no_grad()
def test_changed_weights_are_read_again(runs: list[int]) -> None:
    made = seeded(Deep())
    recorded, compiled = both(made)
    for i in range(CALLS):
        assert equal(recorded(row(i)), compiled(row(i)))
    made.first.weight.mul_(-1)
    made.norm.weight.add_(1)
    for i in range(CALLS):
        assert equal(recorded(row(i)), compiled(row(i)))
    made.norm.weight.data = made.norm.weight.data * 2
    for i in range(CALLS):
        assert equal(recorded(row(i)), compiled(row(i)))
    assert runs


@torch.no_grad()
def test_weights_are_watched_without_guards_of_modules(runs: list[int]) -> None:
    made = seeded(Deep())
    compiled = torch.compile(
        made,
        backend="qpass",
        options={
            "recipe": "w8a8",
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        },
    )
    for change in (lambda w: w, lambda w: w.mul_(-1), lambda w: w.copy_(torch.eye(16))):
        change(made.first.weight)
        for i in range(CALLS):
            want = made(row(i))
            assert (compiled(row(i)) - want).norm() <= 0.05 * want.norm()
    made.first.weight = nn.Parameter(torch.eye(16).flip(0), requires_grad=False)
    for i in range(CALLS):
        want = made(row(i))
        assert (compiled(row(i)) - want).norm() <= 0.05 * want.norm()
    assert runs


@torch.no_grad()
def test_strides_and_sizes_may_change() -> None:
    recorded, compiled = both(seeded(Deep()))
    wide = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    xs = [row(0), wide[:1, ::2], row(1), wide[:1, 16:], row(2, 3), wide[:, :16], row(3)]
    for x in [*xs, *xs, *xs[::-1]]:
        assert equal(recorded(x), compiled(x))


@torch.no_grad()
def test_what_is_random_stays_as_compiled(runs: list[int]) -> None:
    recorded, _ = both(seeded(Deep(lambda x: x + torch.rand_like(x))))
    x = row(0)
    found = [recorded(x) for _ in range(CALLS)]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(found))
    assert not runs


@torch.no_grad()
def test_an_operator_that_copies_is_called_again(runs: list[int]) -> None:
    # every other column: the product reads a copy
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[:, ::2])

    recorded, compiled = both(seeded(Strided()))
    for i in range(CALLS):
        assert equal(recorded(row(i, 2)), compiled(row(i, 2)))
    assert runs


@torch.no_grad()
def test_other_operators_write_where_they_wrote(runs: list[int]) -> None:
    class Float(nn.Module):
        """A product with a parameter, of a part of an argument, and into another argument."""

        def __init__(self) -> None:
            super().__init__()
            self.deep, self.head = Deep(), nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
            kept.add_(torch.cumsum(y[:, 8:], 1))
            return self.deep(x) @ self.head.T + kept.sort().values

    recorded, compiled = both(seeded(Float()))
    one, other = torch.zeros(1, 8), torch.zeros(1, 8)
    for i in range(CALLS):
        got, want = recorded(row(i), row(i + 1), one), compiled(row(i), row(i + 1), other)
        assert equal(got, want)
        assert equal(one, other)
    assert runs


@torch.no_grad()
def test_errors_are_those_of_the_compiled_graph(runs: list[int]) -> None:
    made = seeded(Caching())
    recorded, compiled = both(made)
    one, other = torch.zeros(8, 16), torch.zeros(8, 16)
    for i in range(CALLS):
        recorded(torch.tensor([i]), torch.tensor([i]), one)
        compiled(torch.tensor([i]), torch.tensor([i]), other)
    assert runs
    for ids, at, what in ((99, 6, "outside the table"), (6, 99, "out of bounds")):
        wrong = torch.tensor([ids]), torch.tensor([at])
        with pytest.raises((RuntimeError, IndexError), match=what):
            compiled(*wrong, other)
        with pytest.raises((RuntimeError, IndexError), match=what):
            recorded(*wrong, one)
    ids, at = torch.tensor([3]), torch.tensor([7])
    assert torch.equal(recorded(ids, at, one), compiled(ids, at, other))


@torch.no_grad()
def test_threads_do_not_meet_in_memory() -> None:
    made = seeded(Deep())
    recorded, compiled = both(made)
    xs = [row(i) for i in range(8)]
    want = [compiled(x) for x in xs]
    for x in xs:
        recorded(x)
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(20):
                wrong.extend(i for i, x in enumerate(xs) if not torch.equal(recorded(x), want[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_gradients() -> None:
    made = seeded(Deep())
    recorded, compiled = both(made)
    for _ in range(CALLS):
        with torch.inference_mode():
            assert recorded(row(0)).is_inference()
        with torch.no_grad():
            assert equal(recorded(row(0)), compiled(row(0)))
    for _ in range(CALLS):
        y = recorded(row(0))
        assert torch.equal(y, compiled(row(0)))


@torch.no_grad()
def test_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    monkeypatch.setattr(recording, "MOST_MEMORY", 16)
    recorded, compiled = both(seeded(Deep()))
    for i in range(CALLS):
        assert equal(recorded(row(i)), compiled(row(i)))
    assert not runs


@torch.no_grad()
def test_long_inputs_that_move_are_not_copied(
    monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    monkeypatch.setattr(recording, "SHORT", 16)
    recorded, compiled = both(seeded(Deep()))
    held = [row(i) for i in range(CALLS)]
    for x in held:
        assert equal(recorded(x), compiled(x))
    assert not runs
