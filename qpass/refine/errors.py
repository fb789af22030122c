"""What an error of a value costs the outputs of a model: which tokens and which directions count.

With gradients `g` of a random form of the outputs at a value, an error `e` of a row costs about
`|g|^2 (e G e^T) / n`, G the second moment of all gradients over its mean diagonal: rows and
directions apart, as in the Kronecker-factored Fisher information. Gradients are few and G is shrunk
towards its diagonal.

Shapes: m rows, d entries of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.calibrate.gradients import costs
from qpass.calibrate.rounded import SEED
from qpass.calibrate.tokens import LEAST
from qpass.ir import read
from qpass.plan.refiner import Refining
from qpass.refine.training import Loss, counted

# towards the diagonal
SHRINKAGE = 0.1
# entries of all second moments together, a gigabyte: beyond it all directions count alike
MOST = 2**27


@final
@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """Of errors of one value: weights of the rows of each batch (None: alike), and a root of G."""

    rows: Sequence[Tensor | None]
    root_dd: Tensor | None = None

    def of(self, batch: int, error: Tensor, counted: Tensor | None = None) -> Tensor:
        """The sum over the rows of an error; with `counted` `[m]`, over those only."""
        error_md = error.reshape(-1, error.shape[-1])
        if self.root_dd is not None:
            error_md = error_md @ self.root_dd.to(error_md.dtype)
        cost_m = error_md.square().mean(1)
        rows_m = self.rows[batch]
        # a mask of tokens says nothing about values that lie otherwise
        if rows_m is not None and len(rows_m) == len(cost_m):
            cost_m = cost_m * rows_m
        return (cost_m if counted is None else cost_m[counted]).sum()


def find_costs(task: Refining, values: Sequence[str]) -> Mapping[str, Cost]:
    """That of each value.

    Rows that are kept count alike, and directions too, where the recipe does not weigh tokens and
    where no gradients come from the outputs.
    """
    found: dict[str, Cost] = {}
    if task.plan.recipe.weigh_tokens:
        widths = [int(read.shape(task.reference.node(name))[-1]) for name in values]
        sums = {n: n for n in values} if sum(w * w for w in widths) <= MOST else {}
        measured = costs(task.reference, values, sums, task.batches, SEED, task.kept)
        for name, rows in measured.rows.items():
            mean = float(torch.cat(rows).double().mean())
            if 0 < mean < float("inf"):
                scaled = [(of / mean).clamp_min(LEAST) for of in rows]
                moments = measured.sums.get(name)
                found[name] = Cost(scaled, None if moments is None else _root(moments))
    alike = [None if kept is None else kept.reshape(-1).float() for kept in task.kept]
    for name in values:
        found.setdefault(name, Cost(alike))
    return found


def loss_of(costs: Sequence[Cost]) -> Loss:
    """What errors of the ends of a block cost together."""

    def loss(batch: int, got: Sequence[Tensor], want: Sequence[Tensor], half: int | None) -> Tensor:
        errors = [(g - w).float() for g, w in zip(got, want, strict=True)]
        parts = zip(costs, errors, strict=True)
        return torch.stack([cost.of(batch, e, counted(e, half)) for cost, e in parts]).sum()

    return loss


def _root(g_dd: Tensor) -> Tensor:
    """A matrix R with `R R^T = G`, shrunk, over the mean of its diagonal."""
    diagonal_d = g_dd.diagonal()
    safe_dd = g_dd * (1 - SHRINKAGE)
    safe_dd.diagonal().add_(SHRINKAGE * diagonal_d + 1e-6 * diagonal_d.mean())
    root, _ = torch.linalg.cholesky_ex(safe_dd / safe_dd.diagonal().mean())
    return root.float()
