"""On which inputs a graph is tried while it is compiled, when no data is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from qpass.analyze import find_tables
from qpass.capture.dynamo import Traced
from qpass.ir import Program, read
from qpass.rotations.base import Key
from qpass.rotations.counter import uniforms

aten = torch.ops.aten


def trial_inputs(traced: Traced, examples: Sequence[object]) -> tuple[object, ...]:
    """Inputs of the program: fixed random tokens, everything else as in the arguments given.

    They are on the CPU: choices made from them depend neither on the text that happens to be there
    first nor on the device that the model is on.
    """
    rows = _looked_up(traced.program)
    inputs: list[object] = []
    for node, position in zip(traced.program.inputs, traced.positions, strict=True):
        given = examples[position]
        if isinstance(given, Tensor) and node.name in rows:
            given = _tokens(given, rows[node.name])
        # the graph may write to what it is given
        copied = given.to("cpu", copy=True) if isinstance(given, Tensor) else _number(given)
        inputs.append(copied)
    return tuple(inputs)


def _looked_up(program: Program) -> dict[str, int]:
    """The inputs that are indices into a table as they are, and the rows of its smallest."""
    tables = set(find_tables(program))
    rows: dict[str, int] = {}
    for node in program.graph.nodes:
        if not read.calls(node, aten.embedding.default):
            continue
        table, indices = read.value(node, "weight"), read.value(node, "indices")
        if table.name in tables and indices.op == "placeholder":
            size = cast("int", read.shape(table)[0])
            rows[indices.name] = min(size, rows.get(indices.name, size))
    return rows


def _tokens(like: Tensor, rows: int) -> Tensor:
    numbers = uniforms(Key("trial", 0), like.numel()) * rows
    return numbers.to(like.dtype).reshape(like.shape)


def _number(given: object) -> object:
    """The value of a symbolic number at this moment."""
    if isinstance(given, torch.SymInt):
        return given.node.hint
    return given


def cost(program: Program, inputs: Sequence[object]) -> int:
    """About how many multiplications running the program and making its weights take."""
    tokens = max(
        (math.prod(i.shape) for i in inputs if isinstance(i, Tensor) and not i.is_floating_point()),
        default=1,
    )
    weights = [program.node(use) for use in program.weights]
    return sum(
        math.prod(cast("tuple[int, ...]", shape)) * (tokens + shape[-1])
        for node in weights
        if (shape := read.static_shape(node)) is not None and len(shape) == 2
    )
