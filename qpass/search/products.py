"""What quantizing does to the outputs of products, on samples: a loss that needs no whole run."""

# m sampled rows, n sampled output channels, k input channels

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.ir import Program
from qpass.search.fake import best_clip, fake
from qpass.search.regions import Spot, turned
from qpass.search.trial import Inputs, Trial, fresh

# entries that samples of all products together may have: 1 GB
MOST_ENTRIES = 2**28
# rows of one product that are kept, and that one step looks at
MOST_ROWS, STEP_ROWS, STEP_CHANNELS = 2048, 128, 128


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """A product that is quantized, with rows of its input in the basis of the rewritten program."""

    matmul: Matmul
    x_mk: Tensor
    reading: tuple[Spot, ...]
    writing: tuple[Spot, ...]


@final
class Products:
    """All quantized products of a trial, each with samples of its input."""

    def __init__(self, trial: Trial, after: Program, batches: Sequence[Inputs]) -> None:
        self._trial = trial
        matmuls = [m for m in find_matmuls(after) if m.use in trial.entries]
        rows = _sample(after, matmuls, batches)
        self.all: list[Sampled] = []
        for matmul in matmuls:
            if matmul.value not in rows:
                continue
            spots = trial.turning.spots.get(matmul.use, ())
            reading = tuple(s for s in spots if s.axis == matmul.reads)
            writing = tuple(s for s in spots if s.axis == matmul.writes)
            if reading or writing:
                self.all.append(Sampled(matmul, rows[matmul.value], reading, writing))
        self.clips: dict[str, float] = {}
        for product in self.all:
            use = product.matmul.use
            entry = trial.entries[use]
            self.clips[use] = best_clip(
                self._weight(product)[:STEP_ROWS].contiguous(), entry.weight
            )

    def loss(self, matrices: Sequence[Tensor], generator: torch.Generator, share: float) -> Tensor:
        """The mean relative squared error of a share of the products, on fresh samples."""
        count = max(1, round(share * len(self.all)))
        chosen = torch.randperm(len(self.all), generator=generator)[:count].tolist()
        return torch.stack([self._error(self.all[i], matrices, generator) for i in chosen]).mean()

    def work(self, share: float) -> float:
        """About how many multiplications one step of learning takes."""
        found = 0.0
        for product in self.all:
            n, k = self._weight(product).shape
            m, j = min(STEP_ROWS, len(product.x_mk)), min(STEP_CHANNELS, n)
            found += m * k * sum(s.block.width for s in product.reading)
            found += j * k * sum(s.block.width for s in (*product.reading, *product.writing))
            found += 2 * m * j * k
        # a backward run takes twice what a forward run does
        return 3 * share * found

    def _error(
        self, product: Sampled, matrices: Sequence[Tensor], generator: torch.Generator
    ) -> Tensor:
        entry = self._trial.entries[product.matmul.use]
        at_m = torch.randint(len(product.x_mk), (STEP_ROWS,), generator=generator)
        x_mk = product.x_mk[at_m]
        for spot in product.reading:
            x_mk = turned(x_mk, 1, spot.block, matrices[spot.stack])
        w_nk = self._channels(product, matrices, generator)
        for spot in product.reading:
            w_nk = turned(w_nk, 1, spot.block, matrices[spot.stack])
        read_mk = x_mk if entry.activation is None else fake(x_mk, entry.activation)
        clip = self.clips.get(product.matmul.use, 1.0)
        got_mn = read_mk @ fake(w_nk, entry.weight, clip).mT
        want_mn = (x_mk @ w_nk.mT).detach()
        return (got_mn - want_mn).square().sum() / want_mn.square().sum().clamp_min(1e-20)

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


def _sample(
    after: Program, matmuls: Sequence[Matmul], batches: Sequence[Inputs]
) -> Mapping[str, Tensor]:
    """Rows of every value that products read, evenly from all batches."""
    wanted = {m.value for m in matmuls}
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    widths = {m.value: int(after.node(m.value).meta["val"].shape[-1]) for m in matmuls}
    most = max(1, min(MOST_ROWS, MOST_ENTRIES // max(1, sum(widths.values()))))
    each = -(-most // max(1, len(batches)))

    def keep(node: fx.Node, value: object) -> None:
        if node.name in wanted and isinstance(value, Tensor):
            rows = value.reshape(-1, value.shape[-1])
            # the first rows always count: massive activations sit on the first token
            every = max(1, -(-rows.shape[0] // each))
            found[node.name].append(rows[::every].float())

    for inputs in batches:
        after.run(*fresh(inputs), watch=keep)
    return {name: torch.cat(rows) for name, rows in found.items() if rows}
