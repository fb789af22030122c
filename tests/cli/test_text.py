"""Does a text become the windows that were asked for?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qpass.cli.text import read_windows
from qpass.errors import BadInput
from tests.data.fetch import MODEL

WORDS = " ".join(f"number {n}" for n in range(200))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(WORDS, encoding="utf-8")
    return file


def test_no_file_no_windows() -> None:
    assert read_windows("anywhere", None, 8, 3) is None


@pytest.mark.skipif(not MODEL.exists(), reason="python -m tests.data.fetch has not run")
def test_windows_span_the_text_in_order(text: Path) -> None:
    every = read_windows(str(MODEL), text, 16, 10_000)
    some = read_windows(str(MODEL), text, 16, 5)
    assert every is not None
    assert some is not None
    assert len(some) == 5
    assert all(window.shape == (1, 16) for window in every)
    assert torch.equal(some[0], every[0])
    assert torch.equal(some[-1], every[-1])


@pytest.mark.skipif(not MODEL.exists(), reason="python -m tests.data.fetch has not run")
def test_a_short_text_is_refused(text: Path) -> None:
    with pytest.raises(BadInput, match="hold no window"):
        read_windows(str(MODEL), text, 100_000, 5)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\xff")
    for file in (tmp_path / "absent", tmp_path / "bytes", tmp_path):
        with pytest.raises(BadInput, match="is no text that can be read"):
            read_windows("anywhere", file, 8, 3)
