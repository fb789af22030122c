"""What does a rotation do to real models: how exact, how much of it, and what for?

`python -m tests.real.test_real` prints one row for each model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from torch import Tensor, fx

import qpass
from qpass.analyze import find_matmuls
from qpass.api import RotationReport
from qpass.capture import Captured, capture
from qpass.report.table import Table
from tests.real.models import REAL, Real


@dataclass(frozen=True)
class Measured:
    """A rotation of a model, and the largest over the rms of each product's input."""

    report: RotationReport
    before: tuple[float, ...]
    after: tuple[float, ...]

    def row(self, name: str) -> tuple[object, ...]:
        coverage = self.report.coverage
        return (
            name,
            self.report.max_error,
            self.report.eager_error,
            coverage.folded,
            coverage.online,
            *(_median(v) for v in (self.before, self.after)),
            *(max(v) for v in (self.before, self.after)),
        )


COLUMNS = (
    *("model", "error in float64", "error in float32", "folded", "online"),
    *("max/rms before", "after", "worst before", "worst after"),
)


def measured(entry: Real) -> Measured:
    model, inputs = entry.read().eval(), entry.inputs()
    before = _peaks(capture(model, inputs), inputs)
    report = qpass.rotate(model, inputs)
    return Measured(report, before, _peaks(capture(model, inputs), inputs))


def _peaks(captured: Captured, inputs: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Max over rms of what each product with a weight reads, as it is in the graph."""
    program = captured.program
    reads = {matmul.value for matmul in find_matmuls(program)}
    found: list[float] = []

    def watch(node: fx.Node, value: object) -> None:
        if node.name in reads and isinstance(value, Tensor):
            found.append(float(value.abs().max() / value.pow(2).mean().sqrt()))

    program.run(*captured.flatten(inputs), watch=watch)
    return tuple(found)


def _median(values: tuple[float, ...]) -> float:
    return sorted(values)[len(values) // 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_rotate_exactly_and_have_smaller_peaks(name: str) -> None:
    found = measured(REAL[name])
    assert found.report.max_error <= 1e-9
    # float32 parameters are rounded once more
    assert found.report.eager_error <= 1e-3
    assert found.report.coverage.folded + found.report.coverage.online >= 0.8
    assert _median(found.after) < _median(found.before)
    assert max(found.after) < 0.5 * max(found.before)


def main() -> None:
    names = sys.argv[1:] or list(REAL)
    rows = [measured(REAL[name]).row(name) for name in names]
    sys.stdout.write(Table("real models", COLUMNS, tuple(rows)).text() + "\n")


if __name__ == "__main__":
    main()
