"""The calls that most users need: inspect, rotate and quantize a model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from torch import nn

from qpass.analyze import largest_regions, rotatable_regions
from qpass.bounds import bounds_of, decider, outputs_of, rewritten
from qpass.calibrate import (
    Calibration,
    Codes,
    Store,
    covering,
    expect_ranges,
    key_of,
    needs_data,
    round_products,
    with_ranges,
)
from qpass.capture.call import Captured, Inputs
from qpass.capture.elsewhere import on_cpu, to_cpu
from qpass.capture.export import capture
from qpass.errors import BadInput, expect_instance
from qpass.hf.sample import kept_tokens, sample_call, sample_calls
from qpass.hf.saving import take_over_saving
from qpass.ir import Note, Program, run_passes
from qpass.plan import Capability, Declined, Plan, Recipe
from qpass.plan.choose import choose
from qpass.plan.chooser import Task, expect_data, improved
from qpass.plan.refiner import Refining, expect_refinable, refined
from qpass.quantize.errors import SiteErrors
from qpass.report.coverage import Coverage, find_coverage, online_widths
from qpass.report.inspection import Inspection, inspection
from qpass.report.rotation import rotation_text
from qpass.report.terminal import progress
from qpass.runtime import gpu
from qpass.runtime.device import this_device
from qpass.search.measured import CHOICE
from qpass.targets.module import write_back
from qpass.targets.record import check_float
from qpass.targets.replacing import nearest
from qpass.transform import (
    FoldNorms,
    FoldScales,
    Rewritten,
    carry_out,
    rewrite,
)
from qpass.verify.exact import ExactCheck, largest_error

log = logging.getLogger("qpass")

RecipeLike = str | Path | Mapping[str, object] | Recipe


@final
@dataclass(frozen=True, slots=True)
class RotationReport:
    """What `rotate` did: errors are relative to the largest entry of each output.

    `max_error` is measured on the captured program in float64 with casts widened, `eager_error` on
    the module itself in its own type. `coverage` says how much of the weights of matrix products
    reads rotated inputs, `online` how wide the transforms are that a token costs: products of one
    value share theirs.
    """

    plan: Plan
    notes: tuple[Note, ...]
    max_error: float
    eager_error: float
    coverage: Coverage
    online: tuple[int, ...]

    @property
    def declined(self) -> tuple[Declined, ...]:
        """The regions and weights that are left as they were, each with its reason."""
        return self.plan.declined

    def __str__(self) -> str:
        errors = (self.max_error, self.eager_error)
        return rotation_text(self.plan, self.coverage, self.online, errors)


def inspect(model: nn.Module, inputs: Inputs | None = None) -> Inspection:
    """Find what can change basis in `model`, and why the rest cannot; the model does not change.

    It may be on the meta device, together with `inputs`: nothing here looks at the weights' values.
    Raises BadInput for inputs that do not fit and CaptureFailed where there is no graph.
    """
    sample = sample_call(model, inputs)
    check_float(model)
    captured = capture(model, sample, blank=True)
    bounds = bounds_of(model, captured.program, sample)
    folded, notes = run_passes(captured.program, [FoldNorms(), FoldScales()])
    recipe = Recipe("inspect", rotation="on")
    plan = choose(
        folded,
        bounds.within(recipe),
        refusals=bounds.refusals,
        stored=True,
        pairs=True,
        convolutions=True,
    )
    largest, regions = largest_regions(folded), rotatable_regions(folded)
    after = rewrite(folded, plan).program
    return inspection(folded, largest, regions, plan, after, (*captured.notes, *notes))


def rotate(
    model: nn.Module,
    inputs: Inputs | None = None,
    recipe: RecipeLike | None = None,
    *,
    plan: Plan | str | Path | None = None,
) -> RotationReport:
    """Rotate `model` in place: the same function, in float, with fewer outliers.

    Each rewrite is verified in float64 on `inputs` and undone where it is not exact. `recipe` says
    which rotations (default: all that are free, and online ones elsewhere); its formats are not
    used. Raises ContractBroken, with the model as it was, if the whole is not exact. A model on a
    GPU is worked on on the CPU, and goes back.
    """
    with on_cpu(model):
        return _rotate(model, to_cpu(inputs), recipe, plan)


def _rotate(
    model: nn.Module,
    inputs: Inputs | None,
    recipe: RecipeLike | None,
    plan: Plan | str | Path | None,
) -> RotationReport:
    sample = sample_call(model, inputs)
    check_float(model)
    known = _plan(plan)
    given = Recipe("rotate", rotation="on", head="float", embedding="float")
    if recipe is not None:
        given = Recipe.read(recipe, capability=_capability())
    captured = capture(model, sample)

    bounds = bounds_of(model, captured.program, sample)

    if known is None:
        expect_data(given, given=False)
    decide = decider(known, given, bounds, convolutions=True)
    done = rewritten(model, captured.program, decide, ExactCheck(captured.flatten(sample)))
    kept = replace(done.plan, quantized=())
    before = outputs_of(model, sample)
    written = write_back(model, captured.program, done.program, kept, ties=bounds.ties)
    take_over_saving(model)
    eager_error = largest_error(outputs_of(model, sample), before)
    assert done.error is not None
    notes = (*captured.notes, *done.notes, *written)
    coverage, online = find_coverage(done.program), online_widths(done.program)
    return RotationReport(kept, notes, done.error, eager_error, coverage, online)


def quantize(
    model: nn.Module,
    recipe: RecipeLike = "auto",
    *,
    calibration: Iterable[Inputs] | None = None,
    inputs: Inputs | None = None,
    plan: Plan | str | Path | None = None,
    resume: str | Path | None = None,
) -> nn.Module:
    """Quantize `model` in place, after the rotations that `recipe` asks for, and return it.

    `inputs` is one sample call (default: the first of `calibration`, or one that fits the model);
    it also decides `rotation = "auto"` when there is no calibration data. A `plan` from an earlier
    run is carried out as it is. Roundings that measure their products' inputs do so on
    `calibration`, whose finished codes are kept in the directory `resume`, if one is given: the
    same call goes on from there, to the same bytes. A model on a GPU is worked on on the CPU, and
    goes back. Raises StateError for a model that is quantized already; the model is unchanged
    whenever this raises.
    """
    with on_cpu(model):
        return _quantize(model, recipe, calibration, to_cpu(inputs), plan, resume)


def _quantize(
    model: nn.Module,
    recipe: RecipeLike,
    calibration: Iterable[Inputs] | None,
    inputs: Inputs | None,
    plan: Plan | str | Path | None,
    resume: str | Path | None,
) -> nn.Module:
    batches = [to_cpu(batch) for batch in sample_calls(calibration)]
    sample = sample_call(model, inputs if inputs is not None or not batches else batches[0])
    check_float(model)
    known = _plan(plan)
    given = known.recipe if known else Recipe.read(recipe, capability=_capability())
    gpu.insist(given.device)
    with progress() as advance:
        advance("trace", 0, 1)
        captured = capture(model, sample)
        flat = [captured.flatten(batch) for batch in batches or [sample]]
        kept = [kept_tokens(batch) for batch in batches]
        if batches and given.select:
            chosen = covering(captured.program, flat, kept, given.select)
            flat, kept = [flat[at] for at in chosen], [kept[at] for at in chosen]
        # what stays float gains nothing from a transform that runs with it
        bounds = bounds_of(model, captured.program, sample, held=False)
        advance("trace", 1, 1)

        def measure(folded: Program) -> SiteErrors:
            return _errors(captured.program, folded, flat[0])

        # what measures rotations on data judges all that could turn
        data_decides = CHOICE in given.methods
        errors = measure if given.rotation == "auto" and not data_decides else None
        data = flat if batches else []
        found: list[Note] = []

        def improve(folded: Program, plan: Plan) -> Plan:
            program = captured.program
            better, found[:] = improved(Task(program, folded, plan, data, advance))
            return better

        if known is None:
            expect_data(given, given=bool(batches))
            expect_ranges(given, given=bool(batches))
        expect_refinable(given, given=bool(batches))
        decide = decider(known, given, bounds, errors, improve, calibrated=bool(batches))
        advance("rotate and verify", 0, 1)
        done = rewritten(model, captured.program, decide, ExactCheck(captured.flatten(sample)))
        advance("rotate and verify", 1, 1)
        measured = Calibration(flat, kept) if batches else None
        if known is None and measured is not None:
            told = functools.partial(advance, "find ranges")
            ranged, measured = with_ranges(done.program, done.plan, measured, told)
            done = replace(done, plan=ranged)
        codes = _calibrated(done, measured, resume, lambda at, of: advance("calibrate", at, of))
        if measured is not None:
            of = done.plan, measured.batches, measured.kept, codes, advance
            after = done.program.clone()
            found += refined(Refining(after, done.program, *of))
            done = replace(done, program=after)
        written = write_back(
            model,
            captured.program,
            done.program,
            done.plan,
            lambda entry, parts: codes.take(entry.site) or nearest(entry, parts),
            advance=lambda at, of: advance("quantize", at, of),
            ties=bounds.ties,
        )
    take_over_saving(model)
    for note in (*captured.notes, *found, *done.notes, *written):
        log.info("%s: %s", note.where, note.why)
    return model


def carried_out(model: nn.Module, plan: Plan, inputs: Inputs) -> tuple[Captured, Rewritten]:
    """The program of a float model, and the same after the exact half of a plan for it."""
    captured = capture(model, inputs)
    bounds = bounds_of(model, captured.program, inputs, held=False)
    decide = decider(plan, plan.recipe, bounds)
    return captured, rewritten(model, captured.program, decide, None)


def _calibrated(
    done: Rewritten,
    data: Calibration | None,
    resume: str | Path | None,
    advance: Callable[[int, int], None],
) -> Codes:
    """The codes that rest on data, by site."""
    sites = needs_data(done.plan)
    if not sites and not done.plan.recipe.refinements:
        return Codes()
    if data is None:
        entry = next(q for q in done.plan.quantized if q.site == sites[0])
        raise BadInput(
            f"{entry.site}: rounding {entry.rounding!r} measures its inputs, and there is no data\n"
            '  pass calibration batches, or set rounding = "nearest"'
        )
    store = None
    if resume is not None:
        store = Store(resume, key_of(done.plan, done.program.sources, [*data.batches, data.kept]))
    return round_products(done.program, done.plan, data, store, advance)


def _plan(plan: Plan | str | Path | None) -> Plan | None:
    if plan is None or isinstance(plan, Plan):
        return plan
    expect_instance((str, Path), "plan", plan, "a Plan, or the path of a saved one")
    return Plan.load(plan)


def _capability() -> Capability:
    device = this_device()
    return Capability(int8_dot=device.integer_dot, int4_weights=device.compiled)


def _errors(program: Program, folded: Program, inputs: tuple[object, ...]) -> SiteErrors:
    return SiteErrors(
        program, folded, [inputs], lambda plan: carry_out(program, folded, plan).program
    )
