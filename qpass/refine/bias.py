"""Biases take up what rounding shifts the outputs of products by, on average.

"Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), with means that are
measured: from the first product to the last, a bias gets the mean difference between what the
product gives in the float model and in the quantized one, as it is corrected so far. Rows count by
what their errors cost the outputs of the model. Of each product's shift only as much is taken as
its halves of the data agree on. Biases are added where a module would add one, and the others are
named. Checked: the mean error of a corrected product is what its noise leaves of it.

Shapes: m rows, n entries of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul
from qpass.calibrate.gradients import costs
from qpass.calibrate.rounded import SEED
from qpass.calibrate.stages import Stage
from qpass.calibrate.stream import run_part
from qpass.calibrate.tokens import token_weights
from qpass.ir import Note, Program, edit
from qpass.plan import Role
from qpass.plan.refiner import REFINERS, Refiner, Refining
from qpass.refine.pair import Pair
from qpass.refine.training import put_vector

TINY = 1e-30


@final
@dataclass(frozen=True, slots=True)
class Bias(Refiner):
    name: str = "bias"

    def refine(self, task: Refining) -> tuple[Note, ...]:
        pair = Pair(task)
        matmuls = [m for m in pair.products.values() if pair.entries[m.use].role is Role.LINEAR]
        refused = {m.node: _refuses(task.program, m) for m in matmuls}
        rows = _rows(task, [m for m in matmuls if refused[m.node] is None])
        shares: list[float] = []
        for at, matmul in enumerate(matmuls):
            task.advance("refine biases", at, len(matmuls))
            if refused[matmul.node] is None:
                found = _Shift.of(_errors(task, pair, matmul), rows.get(matmul.node), task.kept)
                _correct(task.program, matmul, found.taken)
                shares.append(found.share)
        task.advance("refine biases", len(matmuls), len(matmuls))
        reasons = Counter(why for why in refused.values() if why is not None)
        notes = [Note(False, self.name, f"{n} products: {why}") for why, n in reasons.items()]
        if shares:
            mean = sum(shares) / len(shares)
            why = f"biases of {len(shares)} products take {mean:.2g} of their squared errors"
            notes.append(Note(True, self.name, why))
        return tuple(notes)


def _refuses(program: Program, matmul: Matmul) -> str | None:
    """Why a product has no bias of its own that could change."""
    owner = program.owners.get(matmul.use)
    paths = Counter(owner.path for owner in program.owners.values())
    if owner is None or paths[owner.path] > 1:
        return "the weight is read in several places"
    if matmul.bias is None:
        if not matmul.takes_bias or owner.module in program.rigid:
            return "the module adds no bias that it does not have yet"
        return None
    bias = program.owners.get(matmul.bias)
    shared = bias is None or paths[bias.path] > 1 or len(program.node(matmul.bias).users) > 1
    return "the bias is read in several places" if shared else None


def _rows(task: Refining, matmuls: Sequence[Matmul]) -> Mapping[str, Sequence[Tensor]]:
    """How much the rows of products count, where the recipe weighs tokens."""
    if not task.plan.recipe.weigh_tokens:
        return {}
    names = [m.node for m in matmuls]
    found = costs(task.reference, names, {}, task.batches, SEED, task.kept)
    # each product by itself
    stages = [Stage(m.node, (m,)) for m in matmuls]
    return token_weights(stages, found.rows)


def _errors(task: Refining, pair: Pair, matmul: Matmul) -> list[Tensor]:
    """What a product should give more, for each batch; the float model goes first."""
    node = task.program.node(matmul.node)
    wants = pair.float.advance(matmul.node)
    errors: list[Tensor] = []
    weights: dict[fx.Node, Tensor] = {}

    def weight(of: fx.Node) -> Tensor | None:
        if task.program.weight(of) is None:
            return None
        if of not in weights:
            stored = pair.stored(of.name)
            weights[of] = task.program.value(of) if stored is None else stored
        return weights[of]

    for values, want in zip(pair.quantized.before(node), wants, strict=True):
        run_part([node], values, weight, pair.activations, {})
        got = values[node]
        assert isinstance(got, Tensor)
        errors.append((want - got).reshape(-1, got.shape[-1]))
    return errors


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Shift:
    """What is taken of a mean error `[n]`, and which part of the squared error that is."""

    taken: Tensor
    share: float

    @staticmethod
    def of(
        errors: Sequence[Tensor],
        rows: Sequence[Tensor] | None,
        kept: Sequence[Tensor | None],
    ) -> _Shift:
        sums: list[Tensor] = []
        squares = 0.0
        for at, error_mn in enumerate(errors):
            error_mn = error_mn.double()
            weight_m = _weights(len(error_mn), None if rows is None else rows[at], kept[at])
            squares += float((weight_m * error_mn.square().sum(1)).sum())
            whole_mn = torch.cat((weight_m.unsqueeze(1), error_mn * weight_m.unsqueeze(1)), 1)
            if len(errors) > 1:
                sums.append(whole_mn.sum(0))
            else:
                sums += [whole_mn[::2].sum(0), whole_mn[1::2].sum(0)]
        halves = torch.stack(sums[::2]).sum(0), torch.stack(sums[1::2]).sum(0)
        one_n, two_n = (half[1:] / half[0].clamp_min(TINY) for half in halves)
        whole = halves[0] + halves[1]
        mean_n = whole[1:] / whole[0].clamp_min(TINY)
        # what a half predicts of the other
        amount = float(2 * (one_n @ two_n) / (one_n @ one_n + two_n @ two_n).clamp_min(TINY))
        taken_n = mean_n * min(1.0, max(0.0, amount))
        gained = (2 * mean_n - taken_n) @ taken_n * whole[0]
        return _Shift(taken_n, float(gained) / squares if squares > 0 else 0.0)


def _weights(count: int, rows: Tensor | None, kept: Tensor | None) -> Tensor:
    if rows is not None and len(rows) == count:
        return rows.double()
    if kept is not None and kept.numel() == count:
        return kept.reshape(-1).double()
    return torch.ones(count, dtype=torch.float64, device="cpu")


def _correct(program: Program, matmul: Matmul, change_n: Tensor) -> None:
    if not bool((change_n != 0).any()):
        return
    use = matmul.bias
    if use is None:
        use = edit.add_bias(program, matmul.node, matmul.use, len(change_n))
    value = program.weights[use].evaluate(program.sources)
    put_vector(program, use, value + change_n)


REFINERS.add(Bias())
