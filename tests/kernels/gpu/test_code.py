"""Does compiled code move each byte once, and would the guards of `make gpu-aot` notice?"""

from __future__ import annotations

import collections
import dataclasses
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted Triton compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

from qpass.runtime.gpu import KERNELS, Build
from qpass.runtime.target import target
from tests.kernels.gpu.aot import guard
from tests.kernels.gpu.compiled import Compiled, compile_build

ON = target("sm_90")


def build(kernel: str, label: str) -> Build:
    """The first build of a kernel whose label starts so."""
    builds = KERNELS[kernel].builds(ON)
    assert not isinstance(builds, str)
    return next(b for b in builds if b.label.startswith(label))


def moved(build: Build, found: Compiled, instruction: str) -> int:
    """Bytes that one program moves by an access of 16 bytes a thread."""
    return found.instructions[f"{instruction}.E.128"] * 16 * build.warps * 32


def test_rotated_rows_are_read_once_and_written_once() -> None:
    one = build("quantize_rows_butterflies", "4096 = 1 x 1 x 4096, int8")
    found = compile_build(one, ON)
    # 16-bit activations and float32 signs, in code without loops
    assert moved(one, found, "LDG") == 4096 * (2 + 4)
    assert moved(one, found, "STG") == 4096
    # besides those, the factor and the scale
    assert found.instructions["LDG.E"] == found.instructions["STG.E"] == 1
    assert found.spills == 0


@pytest.mark.parametrize(("label", "bits"), [("4 bit bf16", 4), ("8 bit bf16", 8)])
def test_a_vector_meets_weights_in_accesses_of_16_bytes(label: str, bits: int) -> None:
    one = build("linear_real_vector", label)
    found = compile_build(one, ON)
    lines = one.constants["BL"]
    assert isinstance(lines, int)
    assert moved(one, found, "LDG") >= lines * 64
    # narrower ones are those of the vector, two values each
    narrow = sum(n for name, n in found.instructions.items() if name in ("LDG.E", "LDG.E.U16"))
    assert narrow <= 32 // bits


CODE = Compiled(64, 0, 1024, collections.Counter(), "IMMA.16832.S8.S8 R1, R2")


def test_guards_notice() -> None:
    plain = dataclasses.replace(build("quantize_rows_butterflies", "4096"), mma="int8")
    assert guard(plain, CODE, ON) is None
    spilled = guard(plain, dataclasses.replace(CODE, spills=2), ON)
    assert spilled is not None
    assert "spilled" in spilled
    large = guard(plain, dataclasses.replace(CODE, shared=ON.shared + 1), ON)
    assert large is not None
    assert "shared memory" in large
    other = guard(plain, dataclasses.replace(CODE, text="FFMA R1, R2, R3"), ON)
    assert other is not None
    assert "int8 products" in other
