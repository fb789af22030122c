"""How a program becomes a callable that inductor has fused around its operators."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from qpass.capture.dynamo import Traced
from qpass.errors import StateError
from qpass.ir import Program, Weight, edit, read
from qpass.ir.alias import written_memory
from qpass.ir.program import copy
from qpass.quantize.linears import Prepared
from qpass.runtime.device import graph_device
from qpass.runtime.packs import AsFloat, Form, depends_on, prepared
from qpass.runtime.values import Stamps, is_freed, stamp_reader, stamps
from qpass.targets.replay import Replay, writes_tokens

Compiled = Callable[..., Sequence[object]]

# thousands of checks a call: dynamo guards the shapes of arguments, and the operators' own tests
# hold what they return to their definitions
_TRUSTED = {"size_asserts": False, "alignment_asserts": False}


def lower(
    traced: Traced,
    examples: Sequence[object],
    config: Mapping[str, object] | None = None,
    *,
    replay: bool = False,
) -> Lowered:
    """Compile a traced program for the arguments that dynamo will pass.

    Parameters that no pass has changed stay arguments; every other weight is prepared once for the
    tensors it comes from, and again when their values change. `examples` are the arguments at the
    time of tracing, `config` are settings of inductor. With `replay` a graph that writes tokens is
    recorded and run again without the calls between its operators, where that can be done.
    """
    graph, layout = _lay_out(traced, examples)
    first = layout.bind(examples)
    arguments = [*(examples[i] for i in layout.kept), *first.prepared]
    inner: dict[str, Any] = {}
    if layout.device.type != "cpu":
        inner["inner_compile"] = _knowing_statics(_statics(traced, layout, arguments))
    settings = {**_TRUSTED, **(config or {})}
    written = written_memory(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    recorded = replay and layout.device.type == "cpu" and writes_tokens(graph.nodes)
    with torch.no_grad(), _fixed_shapes(first.prepared):
        # a copy, as inductor changes what it compiles
        compiled = compile_fx(
            fx.GraphModule(nn.Module(), copy(graph)),
            cast("Any", arguments),
            config_patches=cast("dict[str, Any]", settings),
            **inner,
        )
    places = frozenset(i for i, node in enumerate(inputs) if node in written)
    return Lowered(cast("Compiled", compiled), layout, places if recorded else None)


def _statics(traced: Traced, layout: _Layout, arguments: Sequence[object]) -> list[int]:
    """Which arguments of the compiled graph stay where they are from call to call.

    Those are the weights, and what the caller has promised it of, such as a cache of fixed size.
    """
    given = frozenset(traced.positions)
    weights = [i for i, position in enumerate(layout.kept) if position not in given]
    promised = [
        i
        for i in range(len(layout.kept))
        if isinstance(arguments[i], Tensor) and _PROMISED in vars(arguments[i])
    ]
    return sorted({*weights, *promised, *range(len(layout.kept), len(arguments))})


# what torch._dynamo.mark_static_address leaves on a tensor
_PROMISED = "_dynamo_static_input_type"


def _knowing_statics(statics: Sequence[int]) -> Callable[..., Any]:
    """Inductor's compiler, which then copies no weight into the memory of a CUDA graph.

    It takes what dynamo says of arguments, and dynamo knows nothing of prepared weights.
    """

    def compile_inner(*args: object, **kwargs: object) -> object:
        if not kwargs.get("is_backward", False):
            known = cast("Sequence[int]", kwargs.get("static_input_idxs", ()))
            kwargs["static_input_idxs"] = sorted({*known, *statics})
        return compile_fx_inner(*cast("Any", args), **cast("Any", kwargs))

    return compile_inner


@contextmanager
def _fixed_shapes(tensors: Sequence[Tensor]) -> Generator[None]:
    """While open, tensors are traced with the shapes they have, whatever is assumed of new ones."""
    context = TracingContext.try_get()
    made: list[Tensor] = []
    if context is not None and context.fake_mode is not None:
        # the mode remembers what it made of a tensor only while that is alive
        made += [context.fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    yield
    made.clear()


@final
@dataclass(frozen=True, slots=True)
class _Wanted:
    """A prepared tensor: one part of one form of a weight."""

    weight: Weight
    form: Form
    part: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """The prepared tensors of one set of parameters, and the state these were in."""

    stamps: Stamps
    prepared: tuple[Tensor, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """Where the arguments of the compiled graph come from.

    It takes dynamo's arguments at `kept`, then what is `wanted` of the weights. Those come from
    dynamo's arguments at `places`, by name, and from `fixed`, the constants of the code, and are
    on `device`.
    """

    kept: tuple[int, ...]
    wanted: tuple[_Wanted, ...]
    places: Mapping[str, int]
    fixed: Mapping[str, Tensor]
    device: torch.device

    def bind(self, arguments: Sequence[object]) -> _Bound:
        """Prepare the weights of the parameters among `arguments`."""
        given = {name: cast("Tensor", arguments[i]) for name, i in self.places.items()}
        sources = {**self.fixed, **given}
        # stamped before they are read: what another thread changes meanwhile is made again
        before = stamps(tuple(given.values()))
        parts = (prepared(w.weight, w.form, sources)[w.part] for w in self.wanted)
        # what is made of nothing, such as signs, goes where the graph runs
        return _Bound(before, tuple(cast("Tensor", part).to(self.device) for part in parts))


def _lay_out(traced: Traced, examples: Sequence[object]) -> tuple[fx.Graph, _Layout]:
    """The graph as it is compiled: an argument for each different tensor, none that is unused."""
    program = traced.program
    at = {id(example): i for i, example in enumerate(examples)}
    places = {name: at.get(id(tensor)) for name, tensor in program.sources.items()}
    positions = dict(zip((n.name for n in program.inputs), traced.positions, strict=True))
    graph = copy(program.graph)
    taken: dict[object, list[fx.Node]] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        origin: object = positions.get(node.name)
        if origin is None:
            origin = _origin(program, node, places)
        # sizes stay even where only shapes mention them: inductor takes their symbols from there
        if node.users or isinstance(node.meta["val"], torch.SymInt):
            taken.setdefault(origin, []).append(node)
        else:
            graph.erase_node(node)
    for first, *same in taken.values():
        for node in same:
            edit.replace(node, first)
    kept = sorted(origin for origin in taken if isinstance(origin, int))
    wanted = [origin for origin in taken if isinstance(origin, _Wanted)]
    edit.order_inputs(graph, [taken[origin][0] for origin in (*kept, *wanted)])
    for name, place in places.items():
        if place in kept and is_freed(program.sources[name]):
            raise StateError(
                f"the float weight {name} was freed, and this graph uses it as it is\n"
                "  compile without free_weights"
            )
    names = sorted({name for want in wanted for name in depends_on(want.weight)})
    moving = {name: place for name in names if (place := places[name]) is not None}
    fixed = {name: program.sources[name] for name in names if name not in moving}
    layout = _Layout(tuple(kept), tuple(wanted), moving, fixed, graph_device(examples))
    return graph, layout


def _origin(program: Program, node: fx.Node, places: Mapping[str, int | None]) -> int | _Wanted:
    """The argument that a use of a weight is, or what has to be prepared for it."""
    weight = program.weights[node.name]
    if weight.source is None and len(weight.steps) == 1:
        (step,) = weight.steps
        if isinstance(step, Prepared):
            return _Wanted(step.weight, step.form, step.part)
    dtype = cast("torch.dtype", read.dtype(node))
    if not weight.steps and weight.source is not None:
        place = places[weight.source]
        if place is not None and program.sources[weight.source].dtype == dtype:
            return place
    return _Wanted(weight, AsFloat(dtype), 0)


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """The graph with the prepared tensors of one set of parameters, while these stay as they are.

    That is, while `read` finds the same `stamps`.
    """

    read: Callable[[Sequence[Tensor]], Stamps]
    stamps: Stamps
    run: Compiled


@final
class Lowered:
    """Runs the compiled graph with the prepared weights of the parameters that a call brings."""

    def __init__(self, compiled: Compiled, layout: _Layout, written: frozenset[int] | None) -> None:
        self._compiled = compiled
        self._layout = layout
        # the arguments that are written to, of a graph whose calls are recorded
        self._written = written
        self._kept = layout.kept
        self._places = tuple(layout.places.values())
        # dynamo calls one graph with the parameters of every module that fits its guards
        self._bound: dict[tuple[int, ...], _Ready] = {}
        self._alive: dict[tuple[int, ...], list[weakref.ref[Tensor]]] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: object) -> Sequence[object]:
        sources = [cast("Tensor", arguments[i]) for i in self._places]
        key = tuple(map(id, sources))
        bound = self._bound.get(key)
        if bound is None or bound.stamps != bound.read(sources):
            bound = self._bind(key, sources, arguments)
        return bound.run(*[arguments[i] for i in self._kept])

    def passed(self, arguments: Sequence[object]) -> list[object]:
        """The arguments that the compiled graph takes as they are."""
        return [arguments[i] for i in self._kept]

    def _bind(
        self, key: tuple[int, ...], sources: Sequence[Tensor], arguments: Sequence[object]
    ) -> _Ready:
        def forget(_: object) -> None:
            self._bound.pop(key, None)
            self._alive.pop(key, None)

        with self._lock:
            parts = self._layout.bind(arguments)
            bound = _Ready(stamp_reader(sources), parts.stamps, self._with(parts.prepared))
            if key not in self._alive:
                # the same ids may come again for other tensors once one of these is gone
                self._alive[key] = [weakref.ref(source, forget) for source in sources]
            self._bound[key] = bound
        return bound

    def _with(self, prepared: Sequence[Tensor]) -> Compiled:
        if self._written is not None:
            return Replay(self._compiled, prepared, self._written)
        return lambda *kept: self._compiled(*kept, *prepared)
