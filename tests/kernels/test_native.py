"""Is it said truthfully which kernels exist, and does qpass work without them?"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qpass.ops as ops
from qpass.errors import BadInput
from qpass.runtime import device, native
from qpass.runtime.native import Isa
from tests.kernels.cases import paths, random_packed

needs_library = pytest.mark.skipif(not paths(), reason=str(native.load().why))


@needs_library
def test_the_cap_decides_which_kernel_serves() -> None:
    packed = random_packed(32, 64, 2, (4, True, True), torch.Generator().manual_seed(1))
    for isa in paths():
        with native.capped(isa):
            choice = native.explain_linear(1, packed, torch.float32, integer_activations=True)
        assert isa is Isa.AMX_EMULATED or not any(
            refusal.kernel.endswith(isa.name.lower()) and "capped" in refusal.why
            for refusal in choice.refused
        )
    with native.capped(Isa.PORTABLE):
        choice = native.explain_linear(1, packed, torch.float32, integer_activations=True)
    assert choice.kernel == "linear_codes_portable"
    assert all(refusal.why for refusal in choice.refused)
    assert choice.text().startswith("linear_codes_portable")


@needs_library
def test_every_set_that_is_built_serves_many_rows() -> None:
    packed = random_packed(32, 64, 2, (4, True, True), torch.Generator().manual_seed(1))
    for isa in paths():
        with native.capped(isa):
            codes = native.explain_linear(64, packed, torch.bfloat16, integer_activations=True)
            real = native.explain_linear(64, packed, torch.bfloat16, integer_activations=False)
        assert codes.kernel == f"linear_codes_{isa.name.lower()}"
        assert real.kernel == f"linear_real_{isa.name.lower()}"


@needs_library
def test_a_reason_says_why_a_better_kernel_was_passed_over() -> None:
    packed = random_packed(32, 64, 2, (4, True, True), torch.Generator().manual_seed(1))
    calls = {
        "fewer rows than a tile has": (3, torch.bfloat16),
        "the input is not bfloat16": (64, torch.float32),
        "it does not compute in float64": (64, torch.float64),
    }
    with native.capped(max(paths())):
        for why, (rows, dtype) in calls.items():
            choice = native.explain_linear(rows, packed, dtype, integer_activations=False)
            if Isa.AMX_EMULATED in paths():
                assert why in {refusal.why for refusal in choice.refused}
            assert choice.kernel.startswith("linear_real_")


@needs_library
def test_every_operator_is_explained() -> None:
    packed = random_packed(32, 64, 2, (8, True, False), torch.Generator().manual_seed(1))
    codes = torch.ones(3, 4, dtype=torch.int8)
    for choice in (
        native.explain_linear(5, packed, torch.bfloat16, integer_activations=False),
        native.explain_rows(5, 64, torch.float16, order=1, power=64, bits=8),
        native.explain_rows(5, 63, torch.float64, order=63),
        native.explain_embedding(7, codes, torch.float32),
    ):
        assert choice.kernel != native.PLAIN
    with pytest.raises(BadInput, match="int8"):
        native.explain_embedding(7, codes, torch.int8)


@needs_library
def test_operators_reach_the_library() -> None:
    for name in (
        "hadamard",
        "quantize_rows",
        "linear.codes",
        "linear.real",
        "embedding",
        "attention",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qpass::{name}", "CPU"), name


def test_device_is_a_value() -> None:
    assert device.this_device() == device.this_device()
    assert hash(device.this_device()) == hash(device.this_device())
    assert device.this_device().compiled == (native.load().why is None)


def test_without_a_library_operators_run_and_the_reason_is_told(tmp_path: Path) -> None:
    program = f"""
import pathlib, torch
import qpass._kernels
from qpass import ops
from qpass.runtime import native
native.FILE = "libqpass_missing.so"
found = native.load()
assert found.why is not None and "compiler" in found.why, found
assert "plain PyTorch" in found.text()
codes, scales = ops.quantize_rows(torch.randn(2, 8), 8)
packed = ops.pack_linear(torch.ones(3, 8, dtype=torch.int8), torch.ones(3), bits=8)
assert ops.linear_codes(codes, scales, packed, None, torch.float32).shape == (2, 3)
choice = native.explain_linear(2, packed, torch.float32, integer_activations=True)
assert choice.kernel == native.PLAIN and choice.refused[0].why == found.why

place = pathlib.Path({str(tmp_path)!r})
(place / native.FILE).write_text("not a library")
qpass._kernels.__path__.insert(0, str(place))
native.load.cache_clear()
found = native.load()
assert found.why is not None and "does not load" in found.why, found
assert ops.linear_codes(codes, scales, packed, None, torch.float32).shape == (2, 3)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_operators_work_with_tracing() -> None:
    packed = random_packed(5, 8, 1, (8, False, False), torch.Generator().manual_seed(2))
    native.load()
    arguments = (packed.weight, packed.row_scales, None, None, None, 8, 8, 5)
    torch.library.opcheck(
        torch.ops.qpass.linear.real,
        (torch.randn(3, 8), *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.qpass.quantize_rows.default,
        (torch.randn(3, 8), 8),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert ops.quantize_rows(torch.randn(0, 8), 8)[1].shape == (0, 1)


@needs_library
def test_the_tile_instructions_are_in_the_library() -> None:
    """AMX cannot run everywhere; that the compiler kept its instructions can be seen."""
    found = native.load()
    if Isa.AMX not in found.built or found.path is None:
        pytest.skip("built by a compiler without AMX")
    code = found.path.read_bytes()
    vex = rb"\xc4[\xc2\xe2]"
    instructions = {
        "ldtilecfg": vex + rb"\x78\x49[\x00-\xbf]",
        "tdpbsud": vex + rb"[\x02-\x7a]\x5e[\xc0-\xff]",
        "tdpbf16ps": vex + rb"[\x02-\x7a]\x5c[\xc0-\xff]",
        "tilerelease": vex + rb"\x78\x49\xc0",
    }
    for name, pattern in instructions.items():
        assert re.search(pattern, code, re.DOTALL), name
