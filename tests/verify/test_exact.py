"""Does the exactness check measure what it says, and refuse what it must?"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qpass.capture import capture
from qpass.ir import Affine, Contract, Note, Pass, Program, run_passes
from qpass.verify.exact import PASS_LIMIT, ExactCheck, largest_error, relative_error

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([1.0, -INF], [2.0, -INF], 0.5),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [NAN, 2.0], INF),
        ([INF, 2.0], [1.0, 2.0], INF),
        ([1e-30], [0.0], INF),
        ([0.0], [0.0], 0.0),
        ([], [], 0.0),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_relative_error(value, reference, error):
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == error


def test_what_is_no_real_tensor_is_equal_or_not():
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0.0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == INF
    assert relative_error(3, 3) == 0.0
    assert relative_error(torch.tensor(3), 3) == INF
    assert largest_error((torch.ones(2),), ()) == INF


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies every weight, once over the reals and once not."""

    by: float
    contract: Contract = Contract.EXACT
    name: str = "scale"

    def apply(self, program: Program) -> list[Note]:
        for use, weight in program.weights.items():
            program.weights[use] = weight.then(Affine(self.by, 0.0))
        return [Note(done=True, where="weights", why="scaled")]


def test_a_pass_that_changes_the_function_is_undone():
    x = torch.ones(2, 3)
    program = capture(nn.Linear(3, 4), x).program
    steps = [Scale(1.0), Scale(1 + 10 * PASS_LIMIT), Scale(1.0), Scale(2.0, Contract.QUANTIZES)]
    after, notes = run_passes(program, steps, ExactCheck((x,)))
    assert [note.done for note in notes] == [True, False, True, True]
    assert "undone" in notes[1].why
    assert [step.scale for step in next(iter(after.weights.values())).steps] == [1.0, 1.0, 2.0]


def test_the_program_before_is_run_once(monkeypatch):
    runs = []
    run = Program.run
    monkeypatch.setattr(
        Program, "run", lambda self, *a, **k: runs.append(self) or run(self, *a, **k)
    )
    x = torch.ones(2, 3)
    program = capture(nn.Linear(3, 4), x).program
    run_passes(program, [Scale(1.0)] * 3, ExactCheck((x,)))
    assert len(runs) == 4
