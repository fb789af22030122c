"""Do the shared fixtures do what they say?"""

from __future__ import annotations

import pytest
import torch


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 1, 33)])
def test_fresh_memory_is_poisoned(shape: tuple[int, ...]) -> None:
    like = torch.ones(shape)
    for fresh in (torch.empty(shape), torch.empty_like(like), like.new_empty(shape)):
        assert fresh.isnan().all()
    codes = torch.empty(shape, dtype=torch.int8)
    assert (codes == torch.iinfo(torch.int8).max).all()


def test_models_run_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_a_golden_text_must_exist_and_match(golden, request, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(golden.__globals__, "GOLDEN", tmp_path)
    if request.config.getoption("--update-golden"):
        return
    with pytest.raises(AssertionError, match="update-golden"):
        golden("absent", "text")
    (tmp_path / "present.txt").write_text("text", encoding="utf-8")
    golden("present", "text")
    with pytest.raises(AssertionError):
        golden("present", "other")
