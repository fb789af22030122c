"""Are costly values that many read computed once, and what few read left alone?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qpass.capture import capture
from qpass.ir import Program, read, run_passes
from qpass.ops.materialize import MATERIALIZE
from qpass.targets.attend import LowerAttention
from qpass.targets.compute_once import ComputeOnce
from tests.captured import specimen


def count(program: Program) -> int:
    return sum(read.calls(node, MATERIALIZE) for node in program.graph.nodes)


def test_rotary_angles_are_computed_once_for_all_layers() -> None:
    _, inputs, captured = specimen("llama")
    given = captured.flatten(inputs)
    after, _ = run_passes(captured.program, [ComputeOnce()])
    assert count(after) == 2
    pairs = zip(after.run(*given), captured.program.run(*given), strict=True)
    assert all(torch.equal(new, old) for new, old in pairs)


@pytest.mark.parametrize(("name", "masks"), [("mistral", 1), ("gemma3", 0), ("vision", 0)])
def test_masks_are_computed_once_for_all_layers(name: str, masks: int) -> None:
    # two layers with one mask, two with different ones, two with none
    _, inputs, captured = specimen(name)
    given = captured.flatten(inputs)
    lowered, _ = run_passes(captured.program, [LowerAttention()])
    without = count(run_passes(captured.program, [ComputeOnce()])[0])
    after, _ = run_passes(lowered, [ComputeOnce()])
    assert count(after) - without == masks
    pairs = zip(after.run(*given), lowered.run(*given), strict=True)
    assert all(torch.equal(new, old) for new, old in pairs)


class Waves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        once, twice = x.cos() * 2, x.sin() * 2
        return once + 1, twice + 1, twice * x


def test_what_has_one_reader_stays() -> None:
    x = torch.linspace(-3, 3, 12).reshape(3, 4)
    program = capture(Waves(), x).program
    after, _ = run_passes(program, [ComputeOnce()])
    assert count(after) == 1
    assert all(torch.equal(a, b) for a, b in zip(after.run(x), program.run(x), strict=True))
