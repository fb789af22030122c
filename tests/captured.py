"""The zoo's models with their programs, traced once for all tests of a process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qpass.capture import Captured, capture
from qpass.ir import Note, Program, run_passes
from qpass.transform import FoldNorms
from tests import zoo


@dataclass(frozen=True, eq=False)
class Folded:
    """A program and the same with its norms folded, its flat inputs and its float64 output."""

    program: Program
    folded: Program
    notes: tuple[Note, ...]
    inputs: tuple[object, ...]
    output: Tensor


@functools.cache
def specimen(name: str) -> tuple[nn.Module, Mapping[str, Tensor], Captured]:
    """A model of the zoo, its inputs and its program: shared, so nobody may change them."""
    entry = zoo.specimen(name)
    model, inputs = entry.build(0), entry.inputs()
    return model, inputs, capture(model, inputs)


@functools.cache
def folded(name: str) -> Folded:
    """The program of a model of the zoo before and after folding; shared, so never edited."""
    _, inputs, captured = specimen(name)
    flat = captured.flatten(inputs)
    after, notes = run_passes(captured.program, [FoldNorms()])
    output = captured.program.run(*flat, widen=True)[0]
    assert isinstance(output, Tensor)
    return Folded(captured.program, after, tuple(notes), flat, output)
