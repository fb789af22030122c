"""What quantizing does to the outputs of products, on samples: a loss that needs no whole run."""

# m sampled rows, n sampled output channels, k input channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.calibrate.gradients import costs as costs_of
from qpass.formats import QuantSpec
from qpass.ir import Program, fresh, read
from qpass.plan.chooser import Task
from qpass.search.fake import best_clip, fake
from qpass.search.holdout import split
from qpass.search.regions import Spot, Turning, turned
from qpass.search.trial import Inputs, Trial
from qpass.transform import carry_out

# entries that samples of all products together may have: 1 GB
MOST_ENTRIES = 2**28
# rows of one product that are kept, and that one step looks at
MOST_ROWS, STEP_ROWS, STEP_CHANNELS = 2048, 128, 128


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A product that is quantized, with rows of its input in the basis of the rewritten program.

    `cost` is what an error of a row of the output costs, divided by its squared length.
    """

    matmul: Matmul
    x_mk: Tensor
    cost_m: Tensor
    reading: tuple[Spot, ...]
    writing: tuple[Spot, ...]
    odds_m: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """How often each row is drawn: half at random, half by what its errors cost.

        A few rows, such as those that all tokens attend to, cost more than all others together.
        """
        share_m = self.cost_m * self.x_mk.square().sum(1)
        share_m = share_m / share_m.sum().clamp_min(1e-30)
        object.__setattr__(self, "odds_m", 0.5 * share_m + 0.5 / len(share_m))


@final
class Products:
    """All quantized products of a trial, each with samples of its input."""

    def __init__(
        self,
        trial: Trial,
        before: Program,
        after: Program,
        batches: Sequence[Inputs],
        seed: int,
    ) -> None:
        self._trial = trial
        matmuls = [m for m in find_matmuls(after) if m.use in trial.entries]
        found = sample(before, after, matmuls, batches, trial.base, seed)
        self.all: list[Sampled] = []
        for matmul in matmuls:
            if matmul.use not in found:
                continue
            spots = trial.turning.spots.get(matmul.use, ())
            reading = tuple(s for s in spots if s.axis == matmul.reads)
            writing = tuple(s for s in spots if s.axis == matmul.writes)
            if reading or writing:
                self.all.append(Sampled(matmul, *found[matmul.use], reading, writing))
        self.clips: dict[str, float] = {}
        for product in self.all:
            use = product.matmul.use
            entry = trial.entries[use]
            self.clips[use] = best_clip(
                self._weight(product)[:STEP_ROWS].contiguous(), entry.weight
            )

    def loss(self, matrices: Sequence[Tensor], generator: torch.Generator, share: float) -> Tensor:
        """What the errors of a share of the products cost, on fresh samples, scaled to all."""
        count = max(1, round(share * len(self.all)))
        chosen = torch.randperm(len(self.all), generator=generator)[:count].tolist()
        found = [self.error(self.all[i], matrices, generator) for i in chosen]
        return torch.stack(found).mean() * len(self.all)

    def read_as(self, product: Sampled) -> QuantSpec | None:
        """How the input of a product is quantized."""
        return self._trial.entries[product.matmul.use].activation

    def error(
        self, product: Sampled, matrices: Sequence[Tensor], generator: torch.Generator
    ) -> Tensor:
        """What the errors of one product cost, on fresh samples, under a further turn."""
        entry = self._trial.entries[product.matmul.use]
        at_m = torch.multinomial(product.odds_m, STEP_ROWS, replacement=True, generator=generator)
        x_mk = product.x_mk[at_m]
        for spot in product.reading:
            x_mk = turned(x_mk, 1, spot.block, matrices[spot.stack])
        w_nk = self._channels(product, matrices, generator)
        channels = len(self._weight(product)) / len(w_nk)
        for spot in product.reading:
            w_nk = turned(w_nk, 1, spot.block, matrices[spot.stack])
        read_mk = x_mk if entry.activation is None else fake(x_mk, entry.activation)
        clip = self.clips.get(product.matmul.use, 1.0)
        got_mn = read_mk @ fake(w_nk, entry.weight, clip).mT
        want_mn = x_mk @ w_nk.mT
        # half of the squared move of the form is the divergence; what is drawn often counts less
        weight_m = product.cost_m[at_m] / (len(product.x_mk) * product.odds_m[at_m])
        return 0.5 * channels * ((got_mn - want_mn).square().sum(1) * weight_m).mean()

    def _channels(
        self, product: Sampled, matrices: Sequence[Tensor], generator: torch.Generator
    ) -> Tensor:
        """Some output channels of a weight, turned on that side."""
        w_nk = self._weight(product)
        at_n = torch.randint(len(w_nk), (min(STEP_CHANNELS, len(w_nk)),), generator=generator)
        if len(product.writing) == 1 and product.writing[0].block.width == len(w_nk):
            # only these columns of the matrix are needed
            return matrices[product.writing[0].stack][0][:, at_n].mT @ w_nk
        for spot in product.writing:
            w_nk = turned(w_nk, 0, spot.block, matrices[spot.stack])
        return w_nk[at_n]

    def _weight(self, product: Sampled) -> Tensor:
        base = self._trial.base[product.matmul.use]
        return base if product.matmul.reads == 1 else base.mT


def prepare(task: Task) -> tuple[Trial, Products] | str:
    """The program after a plan with its products on samples, or why nothing can turn there."""
    if not task.plan.quantized:
        return "nothing is rounded"
    after = carry_out(task.program, task.folded, task.plan).program
    turning = Turning.of(task.folded, after, task.plan)
    if not turning.stacks:
        return "nothing that is folded can turn"
    trial = Trial(after, task.plan, turning)
    learning, _ = split(task.batches)
    products = Products(trial, task.program, after, learning, task.plan.recipe.seed)
    return (trial, products) if products.all else "no product reads or makes what can turn"


def sample(
    before: Program,
    after: Program,
    matmuls: Sequence[Matmul],
    batches: Sequence[Inputs],
    weights: Mapping[str, Tensor],
    seed: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows of the input of each product of `after`, and what errors of their outputs cost.

    Costs are those of the same products in `before`, the program as captured; by use.
    """
    most = _most_rows(after, matmuls, len(batches))
    rows = _sample(after, matmuls, batches, weights, most)
    names = {m.node for m in matmuls} & {m.node for m in find_matmuls(before)}
    costs = costs_of(before, names, {}, batches, seed).rows
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for matmul in matmuls:
        if matmul.value in rows and matmul.node in costs:
            kept = [some_m[:: _every(some_m, most)] for some_m in costs[matmul.node]]
            found[matmul.use] = rows[matmul.value], torch.cat(kept)
    return found


def _most_rows(after: Program, matmuls: Sequence[Matmul], batches: int) -> int:
    """How many rows of one batch are kept, at most."""
    widths = {m.value: int(read.shape(after.node(m.value))[-1]) for m in matmuls}
    most = max(1, min(MOST_ROWS, MOST_ENTRIES // max(1, sum(widths.values()))))
    return -(-most // max(1, batches))


def _every(rows: Tensor, most: int) -> int:
    """Which of many rows are kept: the first, where massive activations sit, and each so many."""
    return max(1, -(-len(rows) // most))


def _sample(
    after: Program,
    matmuls: Sequence[Matmul],
    batches: Sequence[Inputs],
    weights: Mapping[str, Tensor],
    most: int,
) -> Mapping[str, Tensor]:
    """Rows of every value that products read, evenly from all batches."""
    found: dict[str, list[Tensor]] = {m.value: [] for m in matmuls}

    def keep(node: fx.Node, value: object) -> None:
        if node.name in found and isinstance(value, Tensor):
            rows = value.reshape(-1, value.shape[-1])
            found[node.name].append(rows[:: _every(rows, most)].float())

    for inputs in batches:
        after.run(*fresh(inputs), watch=keep, weights=weights)
    return {name: torch.cat(rows) for name, rows in found.items() if rows}
