"""The backend that `torch.compile(model, backend="qpass")` calls."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, fx, nn
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.utils.weak import WeakIdKeyDictionary

from qpass.analyze import Region, by_name, rotatable_regions
from qpass.calibrate import expect_ranges, needs_data
from qpass.capture.compiling import Compiling
from qpass.capture.dynamo import Traced, capture_graph
from qpass.capture.trial import cost, trial_inputs
from qpass.errors import BadInput, CaptureFailed, QpassError, StateError, Unsupported, expect
from qpass.ir import Note, Program, read, run_passes
from qpass.plan import Capability, Plan, Recipe
from qpass.plan.choose import choose, held_by_cache
from qpass.plan.chooser import expect_data
from qpass.plan.fits import admitted
from qpass.plan.refiner import expect_refinable
from qpass.plan.remembered import remembered
from qpass.quantize.errors import SiteErrors
from qpass.quantize.linears import QuantizeLinears
from qpass.registry import unknown
from qpass.runtime import disk, gpu, native
from qpass.runtime.device import graph_device, this_device
from qpass.runtime.values import free, is_freed
from qpass.targets.attend import LowerAttention
from qpass.targets.backward import without_backward
from qpass.targets.compute_once import ComputeOnce
from qpass.targets.fuse import FuseRows
from qpass.targets.inductor import lower
from qpass.transform import carry_out, fold_and_rewrite
from qpass.verify.exact import ExactCheck

log = logging.getLogger("qpass")

Compiled = Callable[..., Sequence[object]]
RecipeLike = str | Path | Mapping[str, object] | Recipe

# a rewrite is verified in float64 where that takes seconds, not minutes
VERIFIED_MULTIPLICATIONS = 2**38


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Quantize the graph that dynamo traced, and let inductor compile what is around.

    `options` are the fields of `Options`, `mode` is one of inductor's. What qpass refuses raises
    its own error when the compiled model is called.
    """
    try:
        return _compile(gm, example_inputs, options, _mode(mode))
    except QpassError as error:
        return _refusing(error)


@final
@dataclass(frozen=True, slots=True)
class Options:
    """What `torch.compile(..., options={...})` takes.

    `plan` carries out a plan instead of choosing one, `save_plan` is where to write the choices.
    `strict` refuses a graph in which something planned could not be done. `free_weights` gives
    back the memory of float weights that the compiled graphs do not need; the model then runs only
    as compiled. `isa` names the newest CPU instruction set that the operators of the graph may use
    (portable, avx2, vnni or amx), for comparisons: one that has no kernel of it, or none for a
    call, uses the next lower set. What is chosen to be quantized does not depend on it.
    `reduce_overhead` records what a graph that writes one token does on a CPU, and does that again
    for the next tokens without the calls in between: the same steps in less time, for up to 16 MB.
    """

    recipe: RecipeLike = "auto"
    plan: Plan | str | Path | None = None
    save_plan: str | Path | None = None
    strict: bool = False
    free_weights: bool = False
    isa: str | None = None
    reduce_overhead: bool = True

    @staticmethod
    def read(given: Mapping[str, object]) -> Options:
        """The options by name; an unknown one is an UnknownName with the nearest."""
        known = [field.name for field in dataclasses.fields(Options)]
        for key in given:
            if key not in known:
                raise unknown("option", str(key), known)
        if given.get("plan") is not None and "recipe" in given:
            raise BadInput("options: a plan holds its recipe; give one of plan and recipe")
        return Options(**cast("dict[str, Any]", dict(given)))

    def __post_init__(self) -> None:
        for key in ("strict", "free_weights", "reduce_overhead"):
            value = getattr(self, key)
            expect(isinstance(value, bool), key, value, "true or false")
        paths = (Plan, str, Path)
        others = (("plan", paths, "a path"), ("save_plan", paths[1:], "a path"))
        for key, kinds, allowed in (*others, ("isa", (str,), f"one of {', '.join(native.NAMES)}")):
            value = getattr(self, key)
            expect(value is None or isinstance(value, kinds), key, value, allowed)


def _mode(mode: str | None) -> dict[str, object]:
    """The settings of inductor that a mode stands for."""
    modes: dict[str, dict[str, object]] = list_mode_options()
    if mode is not None and mode not in modes and mode != "default":
        raise unknown("mode", mode, ["default", *modes])
    return {} if mode is None else modes.get(mode, {})


def _compile(
    gm: fx.GraphModule,
    examples: Sequence[object],
    given: Mapping[str, object] | None,
    config: Mapping[str, object],
) -> Compiled:
    start, options = time.perf_counter(), Options.read(given or {})
    device = graph_device(examples)
    if options.free_weights and device.type != "cpu":
        raise Unsupported(
            f"free_weights gives back memory of the CPU, and the model is on {device}\n"
            "  compile without it, or quantize the model itself with qpass.quantize"
        )
    isa = None if options.isa is None else native.named(options.isa)
    if isa is not None and device.type != "cpu":
        raise BadInput(f"isa: chooses CPU kernels, and the model is on {device}; leave it out")
    compiling = Compiling.now()
    if compiling.training(examples):
        _warn_of_training(examples)
        return _untouched(gm, examples, config)
    try:
        traced = compiling.name_owners(capture_graph(gm, examples))
    except CaptureFailed as error:
        if options.strict:
            raise
        warnings.warn(f"a graph is left to inductor unquantized: {error}", stacklevel=2)
        return _untouched(gm, examples, config)
    plan, program, notes = _quantized(traced, examples, options)
    compiled = lower(
        replace(traced, program=program), examples, config, replay=options.reduce_overhead
    )
    if options.save_plan is not None:
        _save(plan, options.save_plan, given)
    if options.free_weights:
        _free(program, compiled.passed(examples))
    for note in (*traced.notes, *notes):
        log.debug("%s: %s", note.where, note.why)
    log.info(
        "compiled a graph with recipe %s in %.1f s: %d weights quantized, %d regions rotated, "
        "%d inputs rotated online, %d steps declined",
        plan.recipe.name,
        time.perf_counter() - start,
        len(plan.quantized),
        len(plan.rotated),
        len(plan.online),
        sum(not note.done for note in notes),
    )
    needing = _needing_gradients(gm) if torch.is_grad_enabled() else []
    run = compiled if isa is None else native.limited(compiled, isa)
    return without_backward(run, needing) if any(needing) else run


def _untouched(
    gm: fx.GraphModule, examples: Sequence[object], config: Mapping[str, object]
) -> Compiled:
    patches = cast("dict[str, Any]", dict(config))
    return cast("Compiled", compile_fx(gm, cast("Any", examples), config_patches=patches))


def _quantized(
    traced: Traced, examples: Sequence[object], options: Options
) -> tuple[Plan, Program, list[Note]]:
    """The plan for a graph, the program after it, and what was done."""
    inputs = trial_inputs(traced, examples)
    freed = any(is_freed(source) for source in traced.program.sources.values())
    # a freed weight reads as zeros: what the first graph verified of it stands
    affordable = cost(traced.program, inputs) <= VERIFIED_MULTIPLICATIONS and not freed
    if not affordable:
        log.debug("rewrites of this graph are not verified: %s", "freed" if freed else "too large")
    done = fold_and_rewrite(
        traced.program,
        lambda folded: _plan(traced, folded, inputs, options, _capability(examples)),
        ExactCheck(inputs) if affordable else None,
    )
    on_cpu = graph_device(examples).type == "cpu"
    quantizing = QuantizeLinears(done.plan.quantized, blocks=not on_cpu)
    program, made = run_passes(done.program, [quantizing])
    if options.strict:
        _refuse_omissions([*done.notes, *made])
    # on a GPU attention is already one kernel, and rows have kernels of their own
    compiled = [LowerAttention(), FuseRows()] if on_cpu and this_device().compiled else []
    program, lowered = run_passes(program, [*compiled, ComputeOnce()])
    return done.plan, program, [*done.notes, *made, *lowered]


def _capability(examples: Sequence[object]) -> Capability:
    """What the device that a graph runs on is fast with."""
    if graph_device(examples).type == "cpu":
        device = this_device()
        return Capability(int8_dot=device.integer_dot, int4_weights=device.compiled)
    fast = gpu.why_not() is None
    return Capability(int8_dot=fast, int4_weights=fast)


def _plan(
    traced: Traced,
    folded: Program,
    inputs: Sequence[object],
    options: Options,
    capability: Capability,
) -> Plan:
    """What to do to this graph: as given, as for an earlier graph of its weights, or chosen."""
    held = held_by_cache(folded)
    if options.plan is not None:
        plan = options.plan if isinstance(options.plan, Plan) else Plan.load(options.plan)
        gpu.insist(plan.recipe.device)
        _refuse_data(plan)
        return _within(plan, folded)
    recipe = _recipe(options.recipe, capability)
    gpu.insist(recipe.device)
    expect_data(recipe, given=False)
    expect_refinable(recipe, given=False)
    expect_ranges(recipe, given=False)
    sources = folded.sources

    def make() -> Plan:
        if recipe.rotation != "auto":
            return choose(folded, recipe, held=held, pairs=True)
        if freed := [name for name, source in sources.items() if is_freed(source)]:
            raise StateError(
                f"the float weight {freed[0]} was freed, and another graph asks for its error\n"
                '  compile without free_weights, or with a rotation that is not "auto"'
            )
        key = disk.fingerprint(*_what_decides(traced.program, recipe, inputs))
        return disk.kept("plan", key, weigh, Plan.read, Plan.json)

    def weigh() -> Plan:
        program = traced.program
        errors = SiteErrors(
            program, folded, [inputs], lambda plan: carry_out(program, folded, plan).program
        )
        return choose(folded, recipe, held=held, pairs=True, errors=errors)

    parameters = [s for s in sources.values() if isinstance(s, nn.Parameter)]
    chosen = remembered(parameters, recipe, make)
    _refuse_data(chosen)
    return _within(chosen, folded)


def _what_decides(
    program: Program, recipe: Recipe, inputs: Sequence[object]
) -> tuple[list[str], list[Tensor]]:
    """All that the choices for a program depend on: texts and tensors."""
    sites = [program.site(use) for use in program.weights]
    names = [node.name for node in program.graph.nodes]
    numbers = [given for given in inputs if not isinstance(given, Tensor)]
    given = [given for given in inputs if isinstance(given, Tensor)]
    texts = [program.text(), repr(program.weights), repr((recipe, sites, names, numbers))]
    return texts, [*program.sources.values(), *given]


def _refuse_data(plan: Plan) -> None:
    """Refuse a plan whose codes rest on data: a compiled graph has none."""
    if sites := needs_data(plan):
        rounding = next(q.rounding for q in plan.quantized if q.site == sites[0])
        raise BadInput(
            f"{sites[0]}: rounding {rounding!r} measures its inputs, which torch.compile cannot\n"
            '  quantize with qpass.quantize and calibration data, or set rounding = "nearest"'
        )


def _within(plan: Plan, program: Program) -> Plan:
    """The part of a plan that this graph can carry out while caches keep their basis."""
    regions: Mapping[str, Region] = {}
    if plan.rotated or plan.paired:
        regions = by_name(rotatable_regions(program, held=held_by_cache(program)))
    free = {name for name, region in regions.items() if region.free}
    sites = {program.site(use) for use in program.weights}
    return replace(
        plan,
        rotated=tuple(r for r in plan.rotated if r.region in free),
        changed=admitted(program, plan, held_by_cache(program)),
        paired=tuple(p for p in plan.paired if not regions.keys().isdisjoint(p.turned)),
        online=tuple(o for o in plan.online if o.site in sites),
        quantized=tuple(q for q in plan.quantized if q.site in sites),
    )


# what was written to each path, and for which options: those of one call of torch.compile
_SAVED: dict[Path, tuple[object, Plan]] = {}


def _save(plan: Plan, to: str | Path, options: object) -> None:
    """Write the choices of all graphs that were compiled with these very options so far."""
    path = Path(to).absolute()
    owner, before = _SAVED.get(path, (None, plan))
    whole = before.joined(plan) if owner is options else plan
    whole.save(path)
    _SAVED[path] = (options, whole)


def _recipe(given: RecipeLike, capability: Capability) -> Recipe:
    if isinstance(given, Mapping) and "recipe" not in given:
        given = {"recipe": "auto", **given}
    return Recipe.read(given, capability=capability)


def _refuse_omissions(notes: Sequence[Note]) -> None:
    if omitted := [note for note in notes if not note.done]:
        lines = "\n".join(f"  {note.where}: {note.why}" for note in omitted)
        raise Unsupported(f"strict: not everything planned could be done\n{lines}")


def _free(program: Program, passed: Sequence[object]) -> None:
    """Free the Parameters that the compiled graph does not take as they are."""
    needed = {id(argument) for argument in passed}
    for source in program.sources.values():
        if isinstance(source, nn.Parameter) and id(source) not in needed:
            free(source)


def _needing_gradients(gm: fx.GraphModule) -> list[bool]:
    """Which outputs dynamo expects to require gradients."""
    values = [
        n.meta.get("example_value") if isinstance(n, fx.Node) else n
        for n in read.returned(gm.graph)
    ]
    return [isinstance(value, Tensor) and value.requires_grad for value in values]


_WARNED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _warn_of_training(examples: Sequence[object]) -> None:
    """Warn once for each model, whichever of its graphs comes first."""
    parameters = [e for e in examples if isinstance(e, nn.Parameter)]
    if any(parameter in _WARNED for parameter in parameters):
        return
    for parameter in parameters:
        _WARNED[parameter] = True
    warnings.warn(
        "the model is in training mode, so qpass leaves it to inductor unquantized; "
        "call model.eval() first",
        stacklevel=2,
    )


def _refusing(error: QpassError) -> Compiled:
    """A callable that raises: what a backend raises itself would reach the user as dynamo's."""

    def refuse(*_: object) -> Sequence[object]:
        raise error.with_traceback(None)

    return refuse
