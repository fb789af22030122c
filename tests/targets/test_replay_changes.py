"""Does a recorded graph follow whatever changes between calls, and leave alone what it must?"""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor, nn

from qpass.runtime import tape
from qpass.targets import recording
from tests.targets.replays import CALLS, Caching, Deep, both, equal, row, seeded, watched_runs

pytestmark = pytest.mark.skipif(not tape.available(), reason="there are no compiled kernels")


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watched_runs(monkeypatch)


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
