"""Are outliers dealt to blocks and spread, exactly, and only where that helps?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from qpass.plan.chooser import CHOOSERS, Task
from qpass.rotations import Element, Kronecker
from qpass.search.duquant import block_of, dual, spread, zigzag
from qpass.search.holdout import Holdout
from qpass.transform import carry_out
from qpass.verify.exact import ExactCheck
from tests.search.driver import W4A4, task, task_of
from tests.zoo import randomise

EXACT = 1e-9


def massive(width: int = 48) -> torch.Tensor:
    """Values with channels that are large, and one value that is larger than all."""
    values = torch.randn(256, width, generator=torch.Generator().manual_seed(0)).double()
    values[:, [1, 2, 5]] *= 20
    values[7, 30] = 400
    return values


@pytest.mark.parametrize("width", [48, 64, 20])
def test_matrices_are_orthogonal_and_lower_peaks(width: int) -> None:
    values = massive(max(width, 32))[:, :width]
    block = block_of(width)
    assert block is not None
    matrix = dual(values, block, 0)
    Element.of("orthogonal", matrix)
    assert (values @ matrix).abs().max() < 0.75 * values.abs().max()
    assert torch.equal(matrix, dual(values, block, 0))
    assert not torch.equal(matrix, dual(values, block, 1))


def test_steps_are_no_worse_than_none() -> None:
    even = torch.full((8, 16), 0.5, dtype=torch.float64)
    even[::2] *= -1
    # no turn makes the range of even values smaller
    assert torch.equal(spread(even, 16, 0), torch.eye(16, dtype=torch.float64))


def test_blocks_are_dealt_alike() -> None:
    sizes = torch.rand(96, generator=torch.Generator().manual_seed(0)) ** 4
    places = zigzag(sizes, 16)
    assert torch.equal(places.sort().values, torch.arange(96))
    before, after = (s.reshape(6, 16).mean(1) for s in (sizes, sizes[places]))
    assert after.std() < 0.1 * before.std()
    # the largest of each block is one of the six largest
    assert sizes[places].reshape(6, 16).amax(1).min() >= sizes.topk(6).values.min()


@pytest.mark.parametrize(("width", "block"), [(576, 64), (1536, 128), (48, 16), (7, None)])
def test_blocks_are_powers_of_two(width: int, block: int | None) -> None:
    assert block_of(width) == block


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vision"])
def test_plans_are_exact_and_no_worse(name: str) -> None:
    given = task(name)
    plan, notes = CHOOSERS["duquant"].choose(given)
    done = carry_out(given.program, given.folded, plan)
    assert (done.plan.rotated, done.plan.online) == (plan.rotated, plan.online)
    assert done.plan.changed == plan.changed
    assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
    assert (plan != given.plan) is notes[0].done
    holdout = Holdout(given)
    assert holdout.score(plan) <= holdout.score(given.plan)


def gated(seed: int = 0, size: float = 60.0, share: float = 1 / 60) -> Task:
    """A value that is made entry by entry, with massive entries that weigh less, then a product."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(16, 96), nn.Linear(16, 96)
            self.down, self.head = nn.Linear(96, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.down(nn.functional.silu(self.gate(x)) * self.up(x))))

    model = Gated().eval()
    randomise(model, 0)
    with torch.no_grad():
        # all in one block
        model.up.weight[:6] *= size
        model.down.weight[:, :6] *= share
        model.down.weight.mul_((1 + size * share) ** -1)
    data = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(0))
    return task_of(model, {"x": data[0]}, {**W4A4, "seed": seed}, [{"x": x} for x in data])


def test_a_permutation_folds_and_blocks_run() -> None:
    seen: set[str] = set()
    for seed in range(3):
        given = gated(seed, size=12.0, share=0.3)
        # without mixing of all channels blocks have to do it
        plain = Kronecker.of(torch.eye(32, dtype=torch.float64), 96)
        online = tuple(
            replace(o, transform=plain) for o in given.plan.online if o.site == "down.weight"
        )
        given = replace(given, plan=replace(given.plan, online=online))
        plan, notes = CHOOSERS["duquant"].choose(given)
        done = carry_out(given.program, given.folded, plan)
        assert done.plan.changed == plan.changed
        assert ExactCheck(given.batches[0]).error(given.program, done.program) <= EXACT
        if notes[0].done:
            seen |= {c.element.kind for c in plan.changed}
            seen |= {"running" for o in plan.online if o.transform != plain}
    assert seen == {"permutation", "running"}


def test_equal_tasks_give_equal_plans() -> None:
    first, second = (CHOOSERS["duquant"].choose(task("llama")) for _ in "ab")
    assert first == second


def test_nothing_is_rounded() -> None:
    given = task("llama", {k: v for k, v in W4A4.items() if k not in ("weight", "activation")})
    assert CHOOSERS["duquant"].choose(given)[0] == given.plan


def test_scales_only_before_what_runs() -> None:
    given = gated()
    plan, notes = CHOOSERS["smoothrot"].choose(given)
    assert notes[0].done, notes
    (changed,) = plan.changed
    assert changed.region.startswith("up.weight")
    holdout = Holdout(given)
    assert holdout.score(plan) < holdout.score(given.plan)
    bare = replace(given, plan=replace(given.plan, online=()))
    plan, (note,) = CHOOSERS["smoothrot"].choose(bare)
    assert plan == bare.plan
    assert "no transform runs" in note.why


def test_methods_leave_what_another_changed() -> None:
    given = gated()
    scaled, notes = CHOOSERS["smooth"].choose(given)
    assert notes[0].done, notes
    for method in ("duquant", "smooth", "smoothrot"):
        plan, _ = CHOOSERS[method].choose(replace(given, plan=scaled))
        assert plan.changed == scaled.changed
