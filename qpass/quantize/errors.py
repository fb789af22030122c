"""How much error a plan causes at each site: predicted from weights and sample activations."""

# m sampled rows of activations, n output channels, k input channels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.ir import ChangeBasis, Program, Weight, fresh
from qpass.ops import as_read
from qpass.plan import Plan, Quantized
from qpass.rounding import ROUNDINGS, without_data

# enough of a site to rank plans by: more changes the third digit
SAMPLED_ROWS = 64
SAMPLED_CHANNELS = 256


class SiteErrors:
    """The squared output error of each quantized product, under any plan.

    The program runs in float on sample inputs, as it is and with its norms folded; a plan is then
    judged site by site, on sampled tokens and output channels, with every other site left float.
    `rewritten` is the program after a plan's rotations. Errors are relative, or, where `costs` says
    by product and batch what an error of each row costs, their cost.
    """

    def __init__(
        self,
        program: Program,
        folded: Program,
        batches: Sequence[Sequence[object]],
        rewritten: Callable[[Plan], Program],
        costs: Mapping[str, Sequence[Tensor]] | None = None,
        rows: int = SAMPLED_ROWS,
    ) -> None:
        # of each batch, at most
        self._most = max(1, rows // len(batches))
        self._plain, self._folded = (_Sampled.of(p, batches, self._most) for p in (program, folded))
        self._rewritten = rewritten
        self._costs = costs
        self._known: dict[tuple[str, Weight, Quantized], float] = {}

    def __call__(self, plan: Plan) -> Mapping[str, float]:
        entries = {entry.site: entry for entry in plan.quantized}
        after = self._rewritten(plan)
        errors: dict[str, float] = {}
        for matmul in self._folded.matmuls:
            site = after.site(matmul.use)
            if (entry := entries.get(site)) is None or matmul.value not in self._folded.rows:
                continue
            weight = after.weights[matmul.use]
            key = (matmul.use, weight, entry)
            if key not in self._known:
                self._known[key] = self._error(matmul, weight, entry)
            errors[site] = errors.get(site, 0.0) + self._known[key]
        return errors

    def _error(self, matmul: Matmul, weight: Weight, entry: Quantized) -> float:
        # whichever of the two programs the weight was changed from
        known = self._folded.program.weights[matmul.use].steps
        base = self._folded if weight.steps[: len(known)] == known else self._plain
        x_mk = base.rows[matmul.value].double()
        sources = base.program.sources
        for step in weight.steps[len(base.program.weights[matmul.use].steps) :]:
            if isinstance(step, ChangeBasis) and step.axis == matmul.reads:
                # the value changes by the inverse transpose of what its reader does
                x_mk = replace(step, axis=1, power=-step.power).apply(x_mk, sources)
        value = weight.evaluate(sources)
        w_nk = value if matmul.reads == 1 else value.mT
        every = -(-w_nk.shape[0] // SAMPLED_CHANNELS)
        w_nk = w_nk[::every].contiguous()
        want_mn = x_mk @ w_nk.mT
        got_mn = _activations(x_mk, entry) @ _weights(w_nk, entry).mT
        error_m = (got_mn - want_mn).square().sum(1)
        if self._costs is None:
            return float(error_m.sum() / want_mn.square().sum().clamp_min(1e-300))
        if (some := self._costs.get(matmul.node)) is None:
            return 0.0
        cost_m = torch.cat([each[:: _every(len(each), self._most)] for each in some]).double()
        # of all rows and channels
        return float(error_m @ cost_m) * every * sum(map(len, some)) / len(cost_m)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Sampled:
    """A program and sampled rows of every value that a product reads."""

    program: Program
    matmuls: tuple[Matmul, ...]
    rows: Mapping[str, Tensor]

    @staticmethod
    def of(program: Program, batches: Sequence[Sequence[object]], most: int) -> _Sampled:
        matmuls = find_matmuls(program)
        return _Sampled(program, matmuls, _sample(program, matmuls, batches, most))


def _weights(w_nk: Tensor, entry: Quantized) -> Tensor:
    # plans that differ in rotations are ranked alike by any rounding
    method = ROUNDINGS[without_data(entry.rounding)]
    quantized = method.round(w_nk, entry.weight, {})
    return quantized.dequantize(torch.float64)


def _activations(x_mk: Tensor, entry: Quantized) -> Tensor:
    if entry.activation is None:
        return x_mk
    return as_read(x_mk.float(), entry.activation).double()


def _sample(
    program: Program,
    matmuls: Sequence[Matmul],
    batches: Sequence[Sequence[object]],
    most: int,
) -> dict[str, Tensor]:
    wanted = {m.value for m in matmuls}
    samples: dict[str, list[Tensor]] = {}

    def keep(node: fx.Node, value: object) -> None:
        if node.name in wanted and isinstance(value, Tensor):
            rows = value.reshape(-1, value.shape[-1])
            # the first rows always count: massive activations sit on the first token
            some = rows[:: _every(rows.shape[0], most)].float()
            samples.setdefault(node.name, []).append(some)

    for inputs in batches:
        # graphs count the tokens of a cache in their inputs, and these are run more than once
        program.run(*fresh(inputs), watch=keep)
    return {name: torch.cat(rows) for name, rows in samples.items()}


def _every(rows: int, most: int) -> int:
    """Which rows of a batch are kept: the first, and each so many."""
    return max(1, rows // most)
