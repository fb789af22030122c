"""May experts that are picked, sorted and counted by number be permuted, and where not?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers.integrations.moe
from torch import Tensor, nn
from torch.nn import functional

from qpass.analyze import Region, find_regions
from qpass.capture import capture
from qpass.ir import Program
from qpass.rotations import Group
from tests.analyze.regions import change, changes_output, copied, differs
from tests.zoo import randomise

# its import defines an operator that some of the models call
__all__ = ["transformers"]

EXPERTS, CHOSEN, WIDTH, ROWS = 4, 2, 6, 10

Mixing = Callable[["Routed", Tensor], Tensor]

PERMUTED: dict[str, Mixing] = {}
HELD: dict[str, Mixing] = {}


class Routed(nn.Module):
    """A router and experts `[e, i, o]`, used in one of many ways."""

    def __init__(self, mixing: Mixing) -> None:
        super().__init__()
        self.router, self.other = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.Parameter(torch.ones(EXPERTS, WIDTH, WIDTH))
        self.vectors = nn.Parameter(torch.ones(EXPERTS, WIDTH))
        self.nudge = nn.Parameter(torch.ones(EXPERTS))
        self.slots = nn.Parameter(torch.ones(ROWS * CHOSEN))
        self.head = nn.Linear(WIDTH, 3)
        self.mixing = mixing

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x).softmax(-1).topk(CHOSEN, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixing(self, x))


def permuted(mixing: Mixing) -> Mixing:
    PERMUTED[mixing.__name__] = mixing
    return mixing


def held(mixing: Mixing) -> Mixing:
    HELD[mixing.__name__] = mixing
    return mixing


def ends(ids: Tensor) -> Tensor:
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    return counts.cumsum(0, dtype=torch.int32)


def grouped(model: Routed, rows: Tensor, ends_e: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(rows, model.experts, ends_e)


@permuted
def gathered(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    rows = x.repeat_interleave(CHOSEN, dim=0).unsqueeze(1)
    made = torch.bmm(rows, model.experts[ids.reshape(-1)]).view(ROWS, CHOSEN, WIDTH)
    return (made * weights.unsqueeze(-1)).sum(1)


@permuted
def grouped_and_added(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    sorted_ids, order = ids.view(-1).sort()
    made = grouped(model, x[order // CHOSEN], ends(sorted_ids)) + model.vectors[sorted_ids]
    made = made * weights.view(-1)[order].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, made)


@permuted
def grouped_and_put_back(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    order = ids.view(-1).argsort()
    made = grouped(model, x[order // CHOSEN], ends(ids.view(-1)))
    places = torch.empty_like(order)
    places[order] = torch.arange(ROWS * CHOSEN)
    made = made[places].view(ROWS, CHOSEN, WIDTH)
    return (made * weights.unsqueeze(-1)).sum(1)


@permuted
def marked(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    order = ids.view(-1).argsort()
    counts = functional.one_hot(ids.view(-1), EXPERTS).sum(0)
    made = grouped(model, x[order // CHOSEN], counts.cumsum(0).int())
    made = made * weights.view(-1).index_select(0, order).unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, made)


@permuted
def scattered(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    share = torch.zeros(ROWS, EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
    made = torch.einsum("ti,eio->teo", x, model.experts)
    return (made * share.unsqueeze(-1)).sum(1)


@permuted
def nudged(model: Routed, x: Tensor) -> Tensor:
    """What is picked by one score is weighed by another; the order of picks is left open."""
    scores = model.router(x).sigmoid()
    _, ids = (scores + model.nudge).topk(CHOSEN, -1, sorted=False)
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    return (functional.embedding(ids, model.vectors) * weights.unsqueeze(-1)).sum(1)


@permuted
def largest_only(model: Routed, x: Tensor) -> Tensor:
    ids = model.router(x).argmax(-1)
    return x * model.vectors[ids]


@permuted
def every_one(model: Routed, x: Tensor) -> Tensor:
    ids = model.router(x).argmax(-1)
    return x * (functional.one_hot(ids, EXPERTS).to(x.dtype) @ model.vectors)


@permuted
def slots_by_size(model: Routed, x: Tensor) -> Tensor:
    """The larger of the picked weights counts more, whichever expert it is of."""
    weights, ids = model.pick(x)
    return (model.vectors[ids] * (weights * model.slots[:CHOSEN]).unsqueeze(-1)).sum(1)


@held
def numbers_as_values(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    return (model.vectors[ids] * (weights + ids.to(x.dtype)).unsqueeze(-1)).sum(1)


@held
def numbers_compared(model: Routed, x: Tensor) -> Tensor:
    weights, ids = model.pick(x)
    return x * torch.where(ids == 0, weights, 0.0).sum(-1, keepdim=True)


@held
def numbered_by_hand(model: Routed, x: Tensor) -> Tensor:
    numbers = torch.arange(EXPERTS).to(x.dtype)
    return x * (model.router(x).softmax(-1) * numbers).sum(-1, keepdim=True)


@held
def summed_in_order(model: Routed, x: Tensor) -> Tensor:
    _, ids = model.pick(x)
    sorted_ids, order = ids.view(-1).sort(stable=True)
    made = grouped(model, x[order // CHOSEN], ends(sorted_ids)).cumsum(0)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, made)


@held
def first_in_order(model: Routed, x: Tensor) -> Tensor:
    _, ids = model.pick(x)
    sorted_ids, order = ids.view(-1).sort(stable=True)
    return grouped(model, x[order // CHOSEN], ends(sorted_ids))[:ROWS]


@held
def halves_in_order(model: Routed, x: Tensor) -> Tensor:
    _, ids = model.pick(x)
    sorted_ids, order = ids.view(-1).sort(stable=True)
    made = grouped(model, x[order // CHOSEN], ends(sorted_ids))
    return made.view(CHOSEN, ROWS, WIDTH).square().sum(0)


@held
def slots_in_order(model: Routed, x: Tensor) -> Tensor:
    _, ids = model.pick(x)
    sorted_ids, order = ids.view(-1).sort(stable=True)
    made = grouped(model, x[order // CHOSEN], ends(sorted_ids)) * model.slots.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, made)


@held
def two_orders_meet(model: Routed, x: Tensor) -> Tensor:
    first = model.router(x).argmax(-1).argsort(stable=True)
    second = model.other(x).argmax(-1).argsort(stable=True)
    return torch.zeros_like(x).index_add(0, first, x[first] * x[second])


@held
def ends_of_others(model: Routed, x: Tensor) -> Tensor:
    ids, others = model.router(x).argmax(-1), model.other(x).argmax(-1)
    order = ids.argsort(stable=True)
    made = grouped(model, x[order], ends(others))
    return torch.zeros_like(x).index_add(0, order, made)


@held
def last_first(model: Routed, x: Tensor) -> Tensor:
    _, ids = model.pick(x)
    sorted_ids, order = ids.view(-1).sort(descending=True, stable=True)
    made = grouped(model, x[order // CHOSEN], ends(sorted_ids))
    return torch.zeros_like(x).index_add(0, order // CHOSEN, made)


@held
def pairs_of_experts(model: Routed, x: Tensor) -> Tensor:
    return x * model.vectors[model.router(x).argmax(-1) // 2]


@held
def orders_of_rows_mixed(model: Routed, x: Tensor) -> Tensor:
    """Picks in an order of each row's own are summed over rows before they are over picks."""
    weights, ids = model.router(x).topk(CHOSEN, -1, sorted=False)
    made = (model.vectors[ids] * weights.unsqueeze(-1)).sum(0)
    return x * made.tanh().square().sum(0)


def built(mixing: Mixing) -> tuple[Program, tuple[object, ...], Tensor]:
    model = Routed(mixing).double()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    found = capture(model.eval(), (x,))
    (want,) = found.program.run(*found.flatten((x,)), widen=True)
    assert isinstance(want, Tensor)
    return found.program, found.flatten((x,)), want


def of_experts(program: Program) -> list[Region]:
    """The regions of the router's outputs."""
    found = find_regions(program, Group.PERMUTATION)
    return [
        region
        for region in found
        if region.width == EXPERTS
        and any(program.site(site.use) == "router.weight" for site in region.sites)
    ]


@pytest.mark.parametrize("name", PERMUTED)
def test_experts_are_permuted_with_their_numbers(name: str) -> None:
    program, flat, want = built(PERMUTED[name])
    (region,) = of_experts(program)
    assert region.free, region.pins
    assert {"router.weight", "router.bias"} < {program.site(site.use) for site in region.sites}
    free = [r for r in find_regions(program, Group.PERMUTATION) if r.free]
    assert not changes_output(program, free, flat, want)


@pytest.mark.parametrize("name", HELD)
def test_numbers_that_mean_something_hold_what_they_number(name: str) -> None:
    program, flat, want = built(HELD[name])
    (region,) = of_experts(program)
    assert not region.free
    moved = any(permutes(program, region, seed, flat, want) for seed in range(5))
    # nothing is promised about the order of picks, but small ones come sorted all the same
    assert moved or name == "orders_of_rows_mixed"
    free = [r for r in find_regions(program, Group.PERMUTATION) if r.free]
    assert not changes_output(program, free, flat, want)


def permutes(
    program: Program, region: Region, seed: int, flat: tuple[object, ...], want: Tensor
) -> bool:
    changed = copied(program)
    change(changed, region, seed)
    return differs(changed.run(*flat, widen=True)[0], want)
