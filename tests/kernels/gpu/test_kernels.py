"""Does every GPU kernel compute its operator, on interpreted Triton?"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make test-gpu-interpret runs these", allow_module_level=True)
pytest.importorskip("triton")

from torch import Tensor

import tests.kernels.gpu.interpreter  # noqa: F401 repairs the interpreter
from qpass.ops.library import specification
from qpass.runtime.gpu import KERNELS, Call, Kernel, choose
from qpass.runtime.target import target
from tests.kernels.gpu.agreement import disagreement
from tests.kernels.gpu.calls import Case, cases, refusals
from tests.kernels.gpu.guarded import Guarded

# every kernel is tried on so many calls
FEWEST = 6
CASES = list(cases())
REFUSED = list(refusals())


def problems(kernel: Kernel, case: Case, on: str = "sm_90") -> list[str]:
    """What is wrong with the kernel's result, its reads and its writes."""
    guard = Guarded()
    named = case.call(target(on)).arguments.items()
    given = [guard.give(k, a) if isinstance(a, Tensor) else a for k, a in named]
    call = Call.of(case.operator, given, target(on))
    with guard:
        got = kernel.launch(call)
    want = specification(case.operator)(*case.call(target(on)).values)
    wrong = disagreement(call, got, want)
    return [*([] if wrong is None else [wrong]), *guard.broken()]


def served(kernel: Kernel) -> list[Case]:
    calls = [case for case in CASES if case.operator == kernel.operator]
    return [case for case in calls if kernel.accepts(case.call(target(home(kernel)))) is None]


def home(kernel: Kernel) -> str:
    """Where a kernel is tried: some are for hardware that was given up."""
    return "sm_80" if isinstance(kernel.builds(target("sm_90")), str) else "sm_90"


PAIRS = [(kernel, case) for kernel in KERNELS for case in served(kernel)]


@pytest.mark.parametrize(
    ("kernel", "case"), PAIRS, ids=lambda value: value.name.replace("torch.", "")
)
def test_kernel_computes_its_operator(kernel: Kernel, case: Case) -> None:
    assert problems(kernel, case, home(kernel)) == []


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_is_tried(kernel: Kernel) -> None:
    assert len(served(kernel)) >= FEWEST


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_call_that_no_kernel_serves_has_reasons(case: Case) -> None:
    chosen = choose(case.call(target("sm_90")))
    assert chosen.kernel is None
    assert all(refusal.why for refusal in chosen.refused)
