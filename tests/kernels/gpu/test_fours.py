"""Are products of 4-bit integers what products of packed bytes become, and is that all there is?"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton

from qpass._kernels.gpu import fours, linear_fours
from qpass.runtime.gpu import Call, choose
from qpass.runtime.target import TARGETS, target
from tests.kernels.gpu.calls_fours import cases

NAME = "mma.sync.aligned.m16n8k32.row.col{}.s32.s8.s8.s32 {{%r1}};"


def bytes_of_a_lane(lane: int) -> dict[str, list[tuple[int, int]]]:
    """Which row (or column) and place of the sum a lane holds, of `m16n8k32` on bytes, by PTX."""
    group, inside = lane >> 2, lane & 3
    a = [
        (group + 8 * (1 if 4 <= i < 8 or i >= 12 else 0), inside * 4 + (i & 3) + 16 * (i >= 8))
        for i in range(16)
    ]
    b = [(group, inside * 4 + (i & 3) + 16 * (i >= 4)) for i in range(8)]
    return {"a": a, "b": b}


def fours_of_a_lane(lane: int) -> dict[str, list[tuple[int, int]]]:
    """The same of `m16n8k64` on 4-bit integers, two to a byte and the first in its low half."""
    group, inside = lane >> 2, lane & 3
    a = [
        (group + 8 * (1 if 8 <= i < 16 or i >= 24 else 0), inside * 8 + (i & 7) + 32 * (i >= 16))
        for i in range(32)
    ]
    b = [(group, inside * 8 + (i & 7) + 32 * (i >= 8)) for i in range(16)]
    return {"a": a, "b": b}


@pytest.mark.parametrize("lane", range(32))
def test_a_lane_holds_the_same_bytes(lane: int) -> None:
    wide, narrow = bytes_of_a_lane(lane), fours_of_a_lane(lane)
    for operand in ("a", "b"):
        pairs = [(row, 2 * k + half) for row, k in wide[operand] for half in (0, 1)]
        assert pairs == narrow[operand]


@pytest.mark.parametrize("kind", ["", ".satfinite"])
def test_names_of_products_are_edited(kind: str) -> None:
    found = fours.in_fours(f"mov.b32 %r1, 0; {NAME.format(kind)} ret;")
    assert (
        found
        == f"mov.b32 %r1, 0; mma.sync.aligned.m16n8k64.row.col{kind}.s32.s4.s4.s32 {{%r1}}; ret;"
    )


@pytest.mark.parametrize(
    "ptx",
    ["ret;", NAME.format("") + "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r2};"],
    ids=["no products", "products of another size"],
)
def test_code_that_is_not_known_is_not_edited(ptx: str) -> None:
    with pytest.raises(RuntimeError, match="unknown here"):
        fours.in_fours(ptx)


def test_other_kernels_are_left_alone() -> None:
    def before(*_: object) -> None:
        return None

    runtime = triton.knobs.runtime
    kept = runtime.add_stages_inspection_hook
    runtime.add_stages_inspection_hook = before
    try:
        with fours.fours():
            assert runtime.add_stages_inspection_hook() == (fours.MARK, fours.MARK)
        assert runtime.add_stages_inspection_hook is before
    finally:
        runtime.add_stages_inspection_hook = kept


def test_who_multiplies_4_bit_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in cases() if c.arguments[5] is None and c.arguments[4] is not None)
    chosen = {t.name: choose(case.call(t)).kernel for t in TARGETS}
    names = {name: None if kernel is None else kernel.name for name, kernel in chosen.items()}
    assert {n for n, k in names.items() if k == "linear_fours"} == {"sm_80", "sm_86", "sm_89"}
    assert names["sm_90"] == names["gfx950"] == "linear_fours_as_bytes"
    monkeypatch.setattr(linear_fours, "has_hook", lambda: False)
    old = choose(case.call(target("sm_80")))
    assert old.kernel is not None
    assert old.kernel.name == "linear_fours_as_bytes"
    assert old.refused[0].why == linear_fours.OLD_TRITON


def test_columns_are_packed_in_the_order_of_words() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("make test-gpu-interpret runs this")
    codes = torch.randint(-8, 8, (3, 22), dtype=torch.int8)
    # two groups of 11 columns, of 2 words in chunks of 2: 8 bytes a group
    out = torch.full((3, 16), 99, dtype=torch.int8)
    linear_fours.pack_columns[(3, 1)](codes, out, 22, 11, 1, 16, BL=2, BLOCK=16)
    for row, packed in zip(codes, out, strict=True):
        for group in range(2):
            columns = torch.nn.functional.pad(row[11 * group : 11 * group + 11], (0, 5))
            words = columns.view(2, 2, 4)
            want = (words[:, 0] & 15) | (words[:, 1] << 4)
            assert torch.equal(packed[8 * group : 8 * group + 8].view(2, 4), want)


def test_the_call_is_that_of_products_of_bytes() -> None:
    case = next(iter(cases()))
    call = case.call(target("sm_80"))
    other = Call.of("linear.codes", case.arguments, target("sm_80"))
    assert call.arguments.keys() == other.arguments.keys()
