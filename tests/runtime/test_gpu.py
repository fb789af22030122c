"""Do CUDA tensors meet kernels, and does nothing else meet Triton?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qpass.ops.library import specification
from qpass.runtime import gpu
from qpass.runtime.target import TARGETS, target

REFUSED = """
import sys
import torch
torch.cuda.is_available = lambda: False
before = set(sys.modules)
import qpass
model, x = torch.nn.Sequential(torch.nn.Linear(32, 32)).eval(), torch.randn(2, 32)
recipe = {"recipe": "w4a16-g64-asym", "device": "cuda", "weight": {"format": "int4", "block": 16}}
for call in (
    lambda: qpass.quantize(model, recipe, inputs=x),
    lambda: torch.compile(model, backend="qpass", options={"recipe": recipe})(x),
):
    try:
        with torch.no_grad():
            call()
    except qpass.QpassError as error:
        assert "no CUDA device" in str(error), error
        assert type(error).__name__ == "Unsupported", error
    else:
        raise AssertionError("it was not refused")
assert "qpass._kernels.gpu" not in set(sys.modules)
recipe["device"] = "any"
assert qpass.quantize(model, recipe, inputs=x) is model
"""

ROOT = Path(__file__).parents[2]

REGISTERS = """
import sys
import torch
import qpass
from qpass.runtime import gpu
gpu.register()
for name in gpu.OPERATORS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qpass::{name}", "CUDA"), name
assert not torch.cuda.is_initialized()
assert "triton" not in set(sys.modules) - before
"""


def test_registering_loads_no_triton_and_leaves_cuda_alone() -> None:
    code = "import sys, torch\nbefore = set(sys.modules)\n" + REGISTERS
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_recipe_for_a_gpu_is_refused_without_one() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_arguments_are_bound_by_name_with_defaults() -> None:
    x = torch.empty(2, 8, device="meta")
    call = gpu.Call.of("quantize_rows", (x, 8), target("sm_90"))
    assert call["x"] is x
    assert call.values == (x, 8, None, None, 1)


@pytest.mark.parametrize("operator", gpu.OPERATORS)
def test_every_operator_that_kernels_may_serve_has_a_specification(operator: str) -> None:
    assert callable(specification(operator))


def test_targets_are_told_apart_and_know_their_limits() -> None:
    assert len({t.name for t in TARGETS}) == len(TARGETS)
    h = target("sm_90")
    # 1 MB takes at least what the bandwidth says, many operations what the peak says
    assert h.seconds(1e6, 0, "bf16") == pytest.approx(1e6 / h.bandwidth)
    assert h.seconds(0, 1e12, "int8") == pytest.approx(1e12 / h.peak["int8"])
    # products of a kind the hardware lacks run on plain arithmetic
    assert not h.has("int4")
    assert h.seconds(0, 1e12, "int4") == pytest.approx(1e12 / h.peak["fp32"])


def test_without_triton_the_definitions_run_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    class Empty:
        __len__ = staticmethod(absent)

    gpu.why_not.cache_clear()
    monkeypatch.setattr(gpu, "KERNELS", Empty())
    why = gpu.why_not()
    gpu.why_not.cache_clear()
    assert why is not None
    assert "qpass[gpu]" in why
