"""The call that measures a changed model: how good it is, and which of its sites cost what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from qpass.api import carried_out
from qpass.calibrate.budget import Changed, Windows, error_budget
from qpass.capture.call import Captured, Inputs
from qpass.capture.elsewhere import on_cpu, to_cpu
from qpass.errors import BadInput, expect
from qpass.plan import Plan
from qpass.quantize.containers import release
from qpass.targets.layers import QuantizedLinear
from qpass.targets.record import record_of
from qpass.targets.tables import QuantizedEmbedding
from qpass.verify import quality
from qpass.verify.calls import Batch, text
from qpass.verify.quality import Bases
from qpass.verify.scores import Budget, Evaluation

# batches that sites are measured on, evenly spaced: each site runs the model once more
BUDGET_BATCHES = 4

How = Literal["predicted", "measured"]
Advance = Callable[[int, int], None]


def evaluate(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    bases: Bases | None = None,
    budget: How | None = None,
    advance: Advance = lambda _at, _of: None,
) -> Evaluation:
    """Compare `model` with `reference` on each row of each batch; a row is one window.

    A batch is token ids `[b, t]`, a tuple of arguments or a dict of keyword arguments; padding is
    where its attention mask is 0. `budget` asks what each quantized site costs, on a few of the
    batches: "predicted" from gradients, which takes a run backward, or also "measured" one site at
    a time. Then `reference` is the float model that was quantized. `advance` is told how many of
    its steps are done. Raises BadInput where there is nothing to compare.
    """
    expect(budget in (None, "predicted", "measured"), "budget", budget, '"predicted", "measured"')
    if budget is None:
        return quality.evaluate(model, reference, batches, bases=bases)
    given = batches if isinstance(batches, Tensor | Mapping | str) else list(batches)
    found = quality.evaluate(model, reference, given, bases=bases)
    with on_cpu(model), on_cpu(reference):
        some = _spread([to_cpu(batch) for batch in given])
        return dataclasses.replace(
            found, budget=_budget(model, reference, some, budget == "measured", advance)
        )


def _budget(
    model: nn.Module, reference: nn.Module, batches: Sequence[Batch], measured: bool, to: Advance
) -> Budget:
    plan = _plan(model, reference)
    calls = [_call(batch) for batch in batches]
    captured, done = carried_out(reference, plan, calls[0])
    data = Windows([captured.flatten(call) for call in calls], [text(batch) for batch in batches])
    sites = _changed(model, done.plan)
    output = _logits(captured, done.program.outputs)
    return error_budget(done.program, sites, data, output, measured=measured, advance=to)


def _plan(model: nn.Module, reference: nn.Module) -> Plan:
    own, other = record_of(model), record_of(reference)
    if not own.quantized:
        raise BadInput("budget: the model is not quantized, so no site costs anything")
    if other.quantized or other.plans != own.plans[:-1]:
        raise BadInput(
            "budget: the reference is not the float model that was quantized\n"
            "  load that model again, and rotate it first if it was"
        )
    return own.plans[-1]


def _changed(model: nn.Module, plan: Plan) -> dict[str, Changed]:
    """What is quantized, by site, as it lies in the model."""
    found: dict[str, Changed] = {}
    for entry in plan.quantized:
        layer = model.get_submodule(entry.site.rpartition(".")[0])
        if isinstance(layer, QuantizedLinear):
            numbers = release(layer.packed, layer.spec).dequantize(torch.float32)
        elif isinstance(layer, QuantizedEmbedding):
            numbers = layer.weight.float()
        else:
            raise BadInput(
                f"budget: {entry.site} is held by a {type(layer).__name__}, not measured"
            )
        found[entry.site] = Changed(numbers, entry.activation)
    return found


def _logits(captured: Captured, outputs: Sequence[fx.Node]) -> fx.Node:
    names = captured.output_names
    return outputs[names.index("logits") if "logits" in names else 0]


def _spread(batches: Sequence[Batch]) -> list[Batch]:
    count = min(BUDGET_BATCHES, len(batches))
    at = torch.linspace(0, len(batches) - 1, count, device="cpu").round().long()
    return [batches[i] for i in at.tolist()]


def _call(batch: Batch) -> Inputs:
    return tuple(batch) if isinstance(batch, list) else batch  # pyright: ignore[reportReturnType]
