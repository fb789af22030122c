"""What do the models of the zoo look like as programs? Traced once for all tests of a process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.capture.export import capture
from qpass.ir import Note, Program, run_passes
from qpass.transform import FoldNorms
from tests.zoo import specimen


@dataclass(frozen=True, eq=False)
class Traced:
    """A model as captured and with its norms folded, its flat inputs and its output in float64."""

    program: Program
    folded: Program
    notes: tuple[Note, ...]
    inputs: tuple[object, ...]
    output: Tensor


@functools.cache
def traced(name: str) -> Traced:
    """The model of the zoo called `name`; what is returned is shared, so never edited."""
    chosen = specimen(name)
    inputs = chosen.inputs()
    found = capture(chosen.build(0), inputs)
    flat = found.flatten(inputs)
    folded, notes = run_passes(found.program, [FoldNorms()])
    output = found.program.run(*flat, widen=True)[0]
    assert isinstance(output, torch.Tensor)
    return Traced(found.program, folded, tuple(notes), flat, output)
