"""How the graph that dynamo hands to a backend becomes a Program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qpass.capture.clean import clean
from qpass.capture.einsum import spell_out_einsums
from qpass.capture.functional import make_functional
from qpass.capture.inline import inline_regions
from qpass.capture.numbers import write_numbers
from qpass.capture.raising import raise_idioms
from qpass.capture.uses import lift, split_uses
from qpass.errors import CaptureFailed
from qpass.ir import Note, Owner, Program, Weight, edit
from qpass.ir.alias import written_memory

# how dynamo writes the way from a module to what it holds
_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A program, and which argument of the backend's callable each of its inputs is."""

    program: Program
    positions: tuple[int, ...]
    notes: tuple[Note, ...]


def capture_graph(module: fx.GraphModule, example_inputs: Sequence[object]) -> Traced:
    """Bring dynamo's graph into the form of `capture`; symbolic sizes stay symbolic.

    Parameters become weights whose sources are the very objects in `example_inputs`; buffers
    remain inputs. Nothing is edited. Raises `CaptureFailed` where the graph cannot be traced.
    """
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    traced = _trace(module, [n.meta["example_value"] for n in placeholders])
    program = Program(inline_regions(traced), {}, {}, {})
    names = _names(placeholders, example_inputs)
    sources: dict[str, Tensor] = {}
    positions: list[int] = []
    for position, node in enumerate(program.inputs):
        name = names[position]
        if name is None:
            positions.append(position)
            continue
        sources[name] = cast("Tensor", example_inputs[position])
        program.weights[node.name] = Weight(name)
        path, _, attribute = name.rpartition(".")
        program.owners[node.name] = Owner(path, attribute)
    program = Program(program.graph, program.weights, sources, program.owners)
    weights = frozenset(sources)
    _adopt_constants(program, traced, sources)
    _refuse_writes(program)
    _fix_numbers(program)
    clean(program)
    make_functional(program)
    clean(program)
    write_numbers(program, sources.keys() - weights)
    split_uses(program)
    spell_out_einsums(program)
    lift(program)
    split_uses(program)
    clean(program)
    program.lint()
    return Traced(program, tuple(positions), tuple(raise_idioms(program)))


def _trace(module: fx.GraphModule, fakes: Sequence[object]) -> fx.GraphModule:
    """The same graph in ATen operators, before any of them is taken apart."""
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        raise CaptureFailed("the graph has no tensor inputs, so there is nothing to quantize")
    run = fx.Interpreter(module, graph=inline_regions(module)).run
    with (
        torch.inference_mode(mode=False),
        torch.no_grad(),
        mode,
        preserve_node_meta(),
    ):
        return make_fx(run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(
            *fakes
        )


def _names(placeholders: Sequence[fx.Node], examples: Sequence[object]) -> list[str | None]:
    """A name for each argument that is a Parameter: its path in the module that was compiled."""
    paths: list[str | None] = []
    for node, example in zip(placeholders, examples, strict=True):
        weight = isinstance(example, nn.Parameter) and not is_traceable_wrapper_subclass(example)
        paths.append(node.meta["grapharg"].source.name if weight else None)
    short = [None if path is None else ".".join(_STEP.findall(path)) or path for path in paths]
    # parameters of several modules may have the same path in theirs
    count = Counter(short)
    return [path if count[name] > 1 else name for name, path in zip(short, paths, strict=True)]


def _adopt_constants(program: Program, module: fx.GraphModule, sources: dict[str, Tensor]) -> None:
    """Turn tensors that the code itself makes, which the trace holds, into weights."""
    for node in list(program.graph.nodes):
        if node.op != "get_attr":
            continue
        name = cast("str", node.target)
        value = getattr(module, name)
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            raise CaptureFailed(f"the graph holds {name}, which is no plain tensor")
        sources[name] = value
        # the trace describes constants in another fake mode than values
        like = edit.fake_like(program, tuple(value.shape), value.dtype)
        edit.replace(node, edit.add_weight(program, name, Weight(name), like))


def _fix_numbers(program: Program) -> None:
    """Write numbers that the module holds into the graph; a guard recompiles when one changes.

    With `dynamic=True` dynamo passes every such number (an epsilon, a scale) as a tensor.
    """
    for node in list(program.graph.nodes):
        number = node.meta.get("val")
        if isinstance(number, torch.SymFloat) and number.node.has_hint():
            edit.fix(node, number.node.guard_float("", 0))


def _refuse_writes(program: Program) -> None:
    for node in written_memory(program.graph):
        if (weight := program.weight(node)) is not None:
            raise CaptureFailed(f"the graph writes to {weight.source}, which is a weight")
