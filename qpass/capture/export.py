"""How a module with sample inputs becomes a Program: through `torch.export`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, fx, nn
from torch._functorch import predispatch
from torch.export import ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from qpass.capture.biases import find_rigid
from qpass.capture.call import Captured, Inputs, arguments, output_names
from qpass.capture.clean import clean
from qpass.capture.einsum import spell_out_einsums
from qpass.capture.functional import make_functional
from qpass.capture.hush import hushed
from qpass.capture.inline import inline_regions
from qpass.capture.numbers import write_numbers
from qpass.capture.parts import capture_parts
from qpass.capture.raising import raise_idioms
from qpass.capture.results import is_plain, plain_results
from qpass.capture.sample import doubled, dynamic_shapes
from qpass.capture.uses import (
    find_owners,
    lift,
    name_modules_from_root,
    name_modules_once,
    split_uses,
)
from qpass.errors import BadInput, CaptureFailed, QpassError, first_line, own_failure
from qpass.ir import Note, Program, Weight, read

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def capture(model: nn.Module, inputs: Inputs, *, blank: bool = False) -> Captured:
    """Trace `model`, in evaluation mode, on sample `inputs`: a tensor, args or kwargs.

    Batch and sequence sizes stay symbolic where the model allows it. The model is left as it is.
    What cannot be traced as a whole is traced in parts. Raises `BadInput` where the inputs do not
    fit, `CaptureFailed` where there is no graph of any part. A model on the meta device, which
    holds no values and cannot run, is taken only if it may be `blank`.
    """
    if not holds_values(model) and not blank:
        raise BadInput(
            f"{type(model).__name__} is on the meta device and holds no values\n"
            "  load its weights first; inspect works without them"
        )
    signature = inspect.signature(model.forward)
    # a cache is state that a graph cannot return; without it the outputs are the same
    extra = {"use_cache": False} if "use_cache" in signature.parameters else {}
    args, kwargs = arguments(inputs, signature, extra)
    check_devices(model, (args, kwargs))
    try:
        return replace(_traced(model, args, kwargs), extra=extra)
    except CaptureFailed as failure:
        # a refusal of qpass's own is no fault of the model's code, which parts could work around
        if not holds_values(model) or isinstance(failure.__cause__, QpassError):
            raise
        result_of(model, args, kwargs)
        program, notes, record = capture_parts(
            model, args, kwargs, _caller(model), _traced, failure
        )
    structure = pytree.tree_flatten((args, kwargs))[1]
    names = tuple(node.name for node in program.outputs)
    return Captured(program, names, tuple(notes), signature, structure, (), extra, record)


def _caller(model: nn.Module) -> Callable[[tuple[object, ...], dict[str, object]], object]:
    def call(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return result_of(model, args, kwargs)

    return call


def _traced(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Captured:
    """The program of one call, whose arguments are bound to the names of the signature."""
    with evaluating(model):
        try:
            exported, notes = _export(model, args, kwargs)
        except CaptureFailed:
            if not holds_values(model) or is_plain(result_of(model, args, kwargs)):
                raise
            with plain_results(model):
                exported, notes = _export(model, args, kwargs)
    program = _program(exported, model)
    # the trace takes tokens outside of the vocabulary and other types, the model need not
    if holds_values(model):
        result_of(model, args, kwargs)
    positions = _drop_constant_inputs(program)
    notes += _fixed_sizes(program)
    notes += raise_idioms(program)
    return Captured(
        program,
        output_names(program, _structure(exported.found.call_spec.out_spec)),
        tuple(notes),
        inspect.signature(model.forward),
        _structure(exported.found.call_spec.in_spec),
        positions,
        {},
    )


def check_devices(model: nn.Module, inputs: object) -> None:
    """Raise BadInput unless the tensors of `model` and `inputs` are on one device."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        raise BadInput(
            f"the model and its inputs are on several devices ({', '.join(devices)})\n"
            "  move them to one first"
        )


def holds_values(model: nn.Module) -> bool:
    """Whether a model can run: none of its tensors is on the meta device."""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; the modes are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(mode=False), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _export(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[_Exported, list[Note]]:
    """Export with symbolic sizes, or, where that fails, with the sizes of the sample."""
    dynamic = doubled((args, kwargs))
    shapes = dynamic_shapes(model, *dynamic)
    try:
        return _exported(model, *dynamic, shapes), []
    except Exception as error:  # noqa: BLE001  the model's own code runs and may raise anything
        symbolic = error
    try:
        exported = _exported(model, args, kwargs, None)
    except Exception as error:
        raise _refusal(model, args, kwargs, error) from error
    why = f"captured with the sizes of the sample inputs only: {first_line(symbolic)}"
    return exported, [Note(done=False, where="inputs", why=why)]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Exported:
    """What `torch.export` found, and its graph as one that writes to nothing."""

    found: ExportedProgram
    graph: fx.Graph


def _exported(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], shapes: object
) -> _Exported:
    sizes = cast("dict[str, Any] | None", shapes)
    with hushed():
        exported = export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
    bodies = [m for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    batches = any(_batches(body.graph) for body in bodies)
    if not batches and not any(_writes(body.graph) for body in bodies):
        return _Exported(exported, inline_regions(exported.graph_module))
    graph = inline_regions(exported.graph_module)
    make_functional(Program(graph, {}, {}, {}))
    if batches or _writes(graph):
        # the general way takes as long as the export itself
        exported = exported.run_decompositions({})
        graph = inline_regions(exported.graph_module)
    return _Exported(exported, graph)


def _writes(graph: fx.Graph) -> bool:
    # the constants that code makes are copied and detached in place, which `clean` drops
    harmless = torch.ops.aten.detach_.default
    return any(read.writes(node) and node.target is not harmless for node in graph.nodes)


def _batches(graph: fx.Graph) -> bool:
    """Whether a graph adds the axes of `torch.vmap`, which only its own trace can run."""
    return any(getattr(n.target, "__module__", None) == predispatch.__name__ for n in graph.nodes)


def _refusal(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], error: Exception
) -> CaptureFailed:
    """Say that the way the model is written made the export fail, unless the inputs did."""
    if holds_values(model):
        result_of(model, args, kwargs)
    return CaptureFailed(
        f"torch.export cannot trace {type(model).__name__}: {first_line(error)}\n"
        "  branches and sizes that depend on tensor values cannot be captured; "
        "torch.compile(model, backend='qpass') captures the parts between them"
    )


def result_of(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """What `model` returns, in evaluation mode; BadInput where it fails on its own."""
    with evaluating(model):
        try:
            return model(*args, **kwargs)
        except Exception as error:
            # whatever the model raises on its own is about its inputs
            raise own_failure(f"{type(model).__name__}", error) from error


def _program(made: _Exported, model: nn.Module) -> Program:
    exported, graph = made.found, made.graph
    signature = exported.graph_signature
    for output in signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise CaptureFailed(
                f"the model's forward writes to {output.target}\n"
                "  qpass captures functions; keep such state outside of the model"
            )
    names = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    weights: dict[str, Weight] = {}
    sources: dict[str, Tensor] = {}
    stored = _stored(model)
    # a tensor that the model holds under several names goes by the first
    first = {id(tensor): name for name, tensor in reversed(stored.items())}
    for spec in signature.input_specs:
        if spec.kind not in _WEIGHTS or spec.target is None:
            continue
        tensor = stored.get(spec.target)
        if tensor is None:
            tensor = cast("Tensor", {**exported.state_dict, **exported.constants}[spec.target])
        source = first.get(id(tensor), spec.target)
        weights[names[spec.arg.name].name], sources[source] = Weight(source), tensor
    program = Program(graph, weights, sources, {})
    clean(program)
    write_numbers(program, sources.keys() - stored.keys())
    split_uses(program)
    name_modules_from_root(program, model)
    name_modules_once(program, model)
    find_owners(program, model, {name: name for name in sources if name in stored})
    program.rigid = find_rigid(program, model)
    program.fixed = frozenset(sources.keys() - _kept(model))
    spell_out_einsums(program)
    lift(program)
    split_uses(program)
    clean(program)
    program.lint()
    return program


def _drop_constant_inputs(program: Program) -> tuple[int, ...]:
    """Erase inputs that are no tensors, which the trace took as constants; say which remain."""
    positions: list[int] = []
    for position, node in enumerate(program.inputs):
        if read.fake(node) is not None:
            positions.append(position)
        elif node.users:
            raise CaptureFailed(f"input {node.name} is no tensor but the graph computes with it")
        else:
            program.graph.erase_node(node)
    return tuple(positions)


def _fixed_sizes(program: Program) -> list[Note]:
    """Say which leading sizes of token-like inputs the model itself fixes."""
    notes: list[Note] = []
    for node in program.inputs:
        if read.is_floating(node):
            continue
        for axis, size in enumerate(read.shape(node)[:2]):
            if isinstance(size, int):
                why = f"axis {axis} has the fixed size {size}: the model depends on it"
                notes.append(Note(done=False, where=node.name, why=why))
    return notes


def _stored(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _kept(model: nn.Module) -> set[str]:
    """The names of the tensors that a checkpoint of the model has."""
    made = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return _stored(model).keys() - made


def _structure(spec: pytree.TreeSpec | None) -> pytree.TreeSpec:
    if spec is None:
        raise CaptureFailed("torch.export does not say how the model is called")
    return spec
