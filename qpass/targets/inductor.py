"""How a program becomes a callable that inductor has fused around its operators."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx

from qpass.capture.dynamo import Traced
from qpass.ir import Program, Weight, edit, read
from qpass.ir.program import copy
from qpass.quantize.linears import Prepared
from qpass.runtime.packs import AsFloat, Form, depends_on, prepared
from qpass.runtime.values import State, stamp

Compiled = Callable[..., Sequence[object]]


def lower(
    traced: Traced, examples: Sequence[object], config: Mapping[str, object] | None = None
) -> Lowered:
    """Compile a traced program for the arguments that dynamo will pass.

    Parameters that no pass has changed stay arguments; every other weight is prepared once for the
    tensors it comes from, and again when their values change. `examples` are the arguments at the
    time of tracing, `config` are settings of inductor.
    """
    layout = _Layout.of(traced, examples)
    first = layout.bind(examples)
    inputs = [*(examples[i] for i in layout.kept), *first.prepared]
    if (context := TracingContext.try_get()) is not None and context.fake_mode is not None:
        # prepared weights have fixed shapes, whatever is assumed about new tensors
        for tensor in first.prepared:
            context.fake_mode.from_tensor(tensor, static_shapes=True)
    with torch.no_grad():
        compiled = compile_fx(
            fx.GraphModule(nn.Module(), layout.graph),
            cast("Any", inputs),
            config_patches=cast("dict[str, Any]", dict(config or {})),
        )
    return Lowered(cast("Compiled", compiled), layout)


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
    """The prepared tensors of one set of Parameters, and the values these had."""

    stamps: tuple[State, ...]
    prepared: tuple[Tensor, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The graph as it is compiled, and where its arguments come from.

    It takes the dynamo arguments at `kept`, then what is `wanted` of the weights, which come from
    the dynamo arguments `sources` and from `fixed`, the constants of the code.
    """

    graph: fx.Graph
    kept: tuple[int, ...]
    wanted: tuple[_Wanted, ...]
    sources: Mapping[str, int]
    fixed: Mapping[str, Tensor]

    @staticmethod
    def of(traced: Traced, examples: Sequence[object]) -> _Layout:
        program = traced.program
        at = {id(example): i for i, example in enumerate(examples)}
        places = {name: at.get(id(tensor)) for name, tensor in program.sources.items()}
        graph = copy(program.graph)
        positions = dict(zip((n.name for n in program.inputs), traced.positions, strict=True))
        taken: dict[object, list[fx.Node]] = {}
        for node in [n for n in graph.nodes if n.op == "placeholder"]:
            origin = positions.get(node.name)
            if origin is None:
                origin = _origin(program, node, places)
            if node.users or isinstance(node.meta["val"], torch.SymInt):
                taken.setdefault(origin, []).append(node)
            else:
                graph.erase_node(node)
        kept = sorted(origin for origin in taken if isinstance(origin, int))
        wanted = [origin for origin in taken if isinstance(origin, _Wanted)]
        _arrange(graph, [taken[origin] for origin in (*kept, *wanted)])
        names = {name for want in wanted for name in depends_on(want.weight)}
        return _Layout(
            graph,
            tuple(kept),
            tuple(wanted),
            {name: at for name in sorted(names) if (at := places[name]) is not None},
            {name: program.sources[name] for name in names if places[name] is None},
        )

    def bind(self, arguments: Sequence[object]) -> _Bound:
        """Prepare the weights of the Parameters among `arguments`."""
        given = {name: cast("Tensor", arguments[i]) for name, i in self.sources.items()}
        sources = {**self.fixed, **given}
        parts = (prepared(w.weight, w.form, sources)[w.part] for w in self.wanted)
        stamps = tuple(map(stamp, given.values()))
        return _Bound(stamps, tuple(cast("Tensor", part) for part in parts))


def _origin(program: Program, node: fx.Node, places: Mapping[str, int | None]) -> object:
    """The dynamo argument that a use of a weight is, or what has to be prepared for it."""
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


def _arrange(graph: fx.Graph, groups: Sequence[Sequence[fx.Node]]) -> None:
    """Let each group of placeholders be one, in this order."""
    for group in groups:
        for same in group[1:]:
            edit.replace(same, group[0])
    for group in reversed(groups):
        first = next(iter(graph.nodes))
        if group[0] is not first:
            first.prepend(group[0])


@final
class Lowered:
    """Runs the compiled graph with the prepared weights of the Parameters that a call brings."""

    def __init__(self, compiled: Compiled, layout: _Layout) -> None:
        self._compiled = compiled
        self._layout = layout
        self._places = tuple(layout.sources.values())
        # dynamo calls one graph with the Parameters of every module that fits its guards
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._alive: dict[tuple[int, ...], list[weakref.ref[Tensor]]] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: object) -> Sequence[object]:
        sources = [cast("Tensor", arguments[i]) for i in self._places]
        key = tuple(map(id, sources))
        bound = self._bound.get(key)
        if bound is None or bound.stamps != tuple(map(stamp, sources)):
            bound = self._bind(key, sources, arguments)
        return self._compiled(*[arguments[i] for i in self._layout.kept], *bound.prepared)

    def passed(self, arguments: Sequence[object]) -> list[object]:
        """The arguments that the compiled graph takes as they are."""
        return [arguments[i] for i in self._layout.kept]

    def _bind(
        self, key: tuple[int, ...], sources: Sequence[Tensor], arguments: Sequence[object]
    ) -> _Bound:
        def forget(_: object) -> None:
            self._bound.pop(key, None)
            self._alive.pop(key, None)

        with self._lock:
            bound = self._layout.bind(arguments)
            if key not in self._alive:
                # the same ids may come again for other tensors once one of these is gone
                self._alive[key] = [weakref.ref(source, forget) for source in sources]
            self._bound[key] = bound
        return bound
