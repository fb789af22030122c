"""Whether two programs compute the same function, measured in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, fx

from qpass.ir import Contract, Pass, Program, fresh, read

# one pass moves float64 values by some thousand roundings of 1e-16; a wrong one by far more
PASS_LIMIT = 1e-10
# ten passes, each at its limit
TOTAL_LIMIT = 1e-9


def relative_error(value: object, reference: object) -> float:
    """The largest difference over the largest magnitude of `reference`.

    Equal infinities and NaN in the same places agree; a NaN or another shape on one side is an
    infinite error. Values that are no tensors of real numbers have error 0 or infinity.
    """
    if not isinstance(value, Tensor) or not isinstance(reference, Tensor):
        same = type(value) is type(reference) and value == reference
        return 0.0 if same else math.inf
    if value.shape != reference.shape:
        return math.inf
    if not value.is_floating_point() or not reference.is_floating_point():
        return 0.0 if torch.equal(value, reference) else math.inf
    a, b = value.detach().double(), reference.detach().double()
    agree = (a == b) | (a.isnan() & b.isnan())
    if agree.all():
        return 0.0
    error = (a - b)[~agree].abs().max().item()
    finite = b[b.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    return error / scale if scale > 0 and math.isfinite(error) else math.inf


def largest_error(values: Sequence[object], references: Sequence[object]) -> float:
    """The worst relative error of several outputs; infinite if one side has more."""
    if len(values) != len(references):
        return math.inf
    return max(map(relative_error, values, references), default=0.0)


@final
class ExactCheck:
    """Runs programs, widened, on sample inputs and compares what they return and write.

    As the check of a run of passes it undoes an EXACT pass that moves an output by more than
    `PASS_LIMIT`. Each program runs once: what came after one pass comes before the next.
    """

    def __init__(self, inputs: Sequence[object]) -> None:
        self._inputs = inputs
        self._first: tuple[Program, tuple[object, ...]] | None = None
        self._last: tuple[Program, tuple[object, ...]] | None = None

    def __call__(self, step: Pass, before: Program, after: Program) -> str | None:
        if step.contract is not Contract.EXACT:
            return None
        error = self.error(before, after)
        # a comparison with NaN is false, so this order also refuses it
        if not error <= PASS_LIMIT:
            return f"the outputs moved by {error:.1e} (limit {PASS_LIMIT:.0e}, float64)"
        return None

    def error(self, before: Program, after: Program) -> float:
        """How far `after` is from `before`, relative to the largest entry of each output."""
        old, new = self._outputs(before), _values(after, self._inputs)
        error = largest_error(new, old)
        # the program that goes on is the one that the next comparison starts from
        self._last = (after, new) if error <= PASS_LIMIT else (before, old)
        return error

    def _outputs(self, program: Program) -> tuple[object, ...]:
        for known in (self._last, self._first):
            if known is not None and known[0] is program:
                return known[1]
        found = _values(program, self._inputs)
        if self._first is None:
            self._first = (program, found)
        return found


def _values(program: Program, inputs: Sequence[object]) -> tuple[object, ...]:
    """What a program returns and what it writes, on inputs that keep their values."""
    written: list[object] = []

    def watch(node: fx.Node, value: object) -> None:
        if read.writes(node):
            written.append(value)

    returned = program.run(*fresh(inputs), widen=True, watch=watch)
    return (*returned, *written)
