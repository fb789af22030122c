"""Products of 4-bit floats as hardware takes them; defects in kernels for blocks and experts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("make test-gpu-interpret runs these", allow_module_level=True)
pytest.importorskip("triton")

from qpass._kernels.gpu.linear_blocks import native
from qpass.registry import Registry
from qpass.runtime.gpu import KERNELS, Kernel
from qpass.runtime.target import TARGETS, target
from tests.kernels.gpu.calls_blocks import cases
from tests.kernels.gpu.case import Case
from tests.kernels.gpu.planted import planted, registered
from tests.kernels.gpu.test_kernels import problems
from tests.kernels.gpu.test_planted import found

__all__ = ["registered"]

PRODUCTS = [case for case in cases() if case.operator == "linear.blocks"]


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_hardware_for_blocks_is_given_the_same_product(case: Case) -> None:
    assert problems(KERNELS["linear_blocks"], case, "sm_120") == []


def test_which_hardware_multiplies_blocks() -> None:
    there = {scales: {t.name for t in TARGETS if native(t, scales)} for scales in ("e8m0", "e4m3")}
    assert there["e8m0"] == {"sm_100", "sm_120", "gfx950"}
    assert there["e4m3"] == {"sm_100", "sm_120"}
    assert not native(target("sm_90"), "e8m0")


DEFECTS = {
    "halves of a byte swapped": ("rows_blocks", "low | (high << 4)", "high | (low << 4)"),
    "a scale that is not the best": ("rows_blocks", "(error < least)", "(error > least)"),
    "a mask dropped": ("rows_blocks", "mask=real[:, None],", "mask=None,"),
    "a scale of the next block": ("rows_blocks", "n + column) // L,", "n + column) // L + 1,"),
    "signs lost": ("rows_blocks", "(y < 0) & (code > 0), 8", "(y < 0) & (code > 0), 0"),
    "signs lost in a product": ("linear_blocks", "wide & 15", "wide & 7"),
    "a row too many": ("linear_blocks", "real_i = i < m", "real_i = i <= m"),
    "a step too few": ("linear_blocks", "steps = tl.cdiv(half,", "steps = (half //"),
    "a row of the next expert": ("linear_experts", "real_i = i < end", "real_i = i <= end"),
    "the expert before": ("linear_experts", "blocks = expert.to", "blocks = (expert // 2).to"),
    "rows of none left out": ("linear_experts", "end = tl.where(e < experts, end, t)", "pass"),
    "scales of other rows": ("linear_blocks", "x_scales += i.to", "x_scales += (i // 2).to"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(
    defect: str, registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, right, wrong = DEFECTS[defect]
    planted(name, {right: wrong}, tmp_path, monkeypatch)
    assert found(registered, "quantize_blocks" if name == "rows_blocks" else name)


def test_a_rank_too_small_is_found(
    registered: Registry[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted("low_rank", {"(r < rank)": "(r < rank - 1)"}, tmp_path, monkeypatch)
    for name in ("matrix", "linear_real_matrix", "linear_codes_matrix", "linear_low_rank"):
        planted(name, {}, tmp_path, monkeypatch)
    assert found(registered, "linear_codes_matrix_low_rank")
