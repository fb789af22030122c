"""Would the tests of GPU kernels notice a defect?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make test-gpu-interpret runs these", allow_module_level=True)
pytest.importorskip("triton")

from qpass.registry import Registry
from qpass.runtime.gpu import Kernel
from qpass.runtime.target import target
from tests.kernels.gpu.planted import planted, registered
from tests.kernels.gpu.test_kernels import CASES, problems

__all__ = ["registered"]


def found(kernels: Registry[Kernel], name: str) -> list[str]:
    """What is wrong with a kernel on all the calls it is tried on."""
    kernel = kernels[name]
    on = target("sm_90")
    # the small ones, which each take milliseconds
    calls = [c for c in CASES if c.operator == kernel.operator and c.arguments[0].numel() < SMALL]
    served = [case for case in calls if kernel.accepts(case.call(on)) is None]
    return [problem for case in served for problem in problems(kernel, case)]


SMALL = 2**13
ROWS_KERNEL = "quantize_rows_butterflies"
ROWS = "(r < rows) & (block < blocks)"
NIBBLES = {"low = words & _LOWS": "high = words & _LOWS",
           "high = (words >> 4) & _LOWS": "low = (words >> 4) & _LOWS"}  # fmt: skip
STORE = "tl.store(out_ptr + place, codes, mask=held)"


def test_the_copies_are_right_before_anything_is_put_in(
    registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("rows", {ROWS: ROWS}, tmp_path, monkeypatch)
    assert found(registered, ROWS_KERNEL) == []


def test_one_row_too_many_is_found(
    registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ROWS.replace("r < rows", "r <= rows")
    planted("rows", {ROWS: more}, tmp_path, monkeypatch)
    assert any("past an end" in problem for problem in found(registered, ROWS_KERNEL))


def test_one_row_too_few_is_found(
    registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = ROWS.replace("r < rows", "r < rows - 1")
    planted("rows", {ROWS: fewer}, tmp_path, monkeypatch)
    assert found(registered, ROWS_KERNEL)


def test_a_dropped_mask_is_found(
    registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("rows", {STORE: STORE.replace(", mask=held", "")}, tmp_path, monkeypatch)
    assert any("past an end" in problem for problem in found(registered, ROWS_KERNEL))


def test_swapped_halves_of_a_byte_are_found(
    registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("words", NIBBLES, tmp_path, monkeypatch)
    planted("linear_codes_matrix", {}, tmp_path, monkeypatch)
    assert found(registered, "linear_codes_matrix")
