"""How much of a model reads rotated inputs, and what that costs for each token."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import fx

from qpass.analyze import MOVES, Convolution, channels_turned, find_convolutions
from qpass.analyze.readers import find_readers
from qpass.ir import ChangeBasis, Program, Weight, read
from qpass.report.table import Table
from qpass.transform.turn import turn_of

aten = torch.ops.aten


class Coverage(NamedTuple):
    """How the inputs of matrix products are rotated, as fractions of the entries of their weights.

    `folded`: by what other weights have absorbed. `online`: while the model runs. They sum to 1.
    Convolutions are products, too, of the channels of each group. Where an entry of a result reads
    one channel alone, there is nothing that a rotation could mix, and the weight does not count.
    """

    folded: float
    online: float
    declined: float


def find_coverage(program: Program) -> Coverage:
    """What the weights of a program have absorbed; a weight of several uses counts once."""
    convolved = {c.use: c for c in find_convolutions(program)}
    shapes = {use: read.static_shape(program.node(use)) or () for use in program.weights}
    readers: dict[str, tuple[int, ...]] = {}
    for use, axes in find_readers(program).items():
        if use in convolved and convolved[use].width == 1:
            continue
        if wide := tuple(axis for axis in axes if shapes[use][axis] != 1):
            readers[use] = wide
    uses = Counter(program.weights[use].source or use for use in readers)
    entries = {"folded": 0.0, "online": 0.0, "declined": 0.0}
    for use, axes in readers.items():
        share = math.prod(shapes[use]) / uses[program.weights[use].source or use]
        turned = max(_turned(program.weights[use], axis, shapes[use][axis]) for axis in axes)
        how = "online" if reads_turned(program, use, convolved.get(use)) else "folded"
        turned = 1.0 if how == "online" else turned
        entries[how] += share * turned
        entries["declined"] += share * (1 - turned)
    total = sum(entries.values())
    if total == 0:
        return Coverage(0.0, 0.0, 1.0)
    return Coverage(**{how: count / total for how, count in entries.items()})


def online_widths(program: Program) -> tuple[int, ...]:
    """The width of each transform that runs with a program; products of one value share theirs."""
    hadamard = torch.ops.qpass.hadamard.default
    found = [n for n in program.graph.nodes if read.calls(n, hadamard)]
    return tuple(sorted(int(read.shape(read.value(n, "signs"))[0]) for n in found))


def coverage_table(coverage: Coverage, online: tuple[int, ...]) -> Table:
    """One row: the fractions, and how many online transforms of which widths a token costs."""
    widths = ", ".join(f"{count} x {width}" for width, count in sorted(Counter(online).items()))
    columns = (*Coverage._fields, "online transforms", "widths")
    return Table("inputs of products", columns, ((*coverage, len(online), widths or None),))


def _turned(weight: Weight, axis: int, length: int) -> float:
    """The part of an axis that changed basis."""
    blocks = {
        step.block for step in weight.steps if isinstance(step, ChangeBasis) and step.axis == axis
    }
    return min(1.0, sum(math.prod(block.sizes) for block in blocks) / length)


def reads_turned(program: Program, use: str, convolution: Convolution | None = None) -> bool:
    """Whether a product with a use of a weight reads what a transform has just made."""
    if convolution is not None and channels_turned(program, convolution) is not None:
        return True
    inputs = [value for user in _readers(program, use) for value in user.all_input_nodes]
    turns = [turn for value in inputs if (turn := turn_of(value)) is not None]
    return any(read.calls(value, torch.ops.qpass.hadamard.default) for value in inputs) or any(
        not turn.inverse for turn in turns
    )


def _readers(program: Program, use: str) -> list[fx.Node]:
    """What reads a weight, or rows of it."""
    found: list[fx.Node] = []
    pending = [program.node(use)]
    while pending:
        for user in pending.pop().users:
            moves = read.calls(user, *MOVES, aten.index.Tensor, aten.index_select.default)
            (pending if moves else found).append(user)
    return found
