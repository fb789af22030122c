"""What does qpass write where nobody asked: nothing, unless a person is watching."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.zoo import specimen

ROOT = Path(__file__).parents[2]
COMMAND = "import sys; from qpass.cli.main import run; sys.exit(run(sys.argv[1:]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = tmp_path_factory.mktemp("model")
    specimen("llama_tied").build(0).to(torch.float32).save_pretrained(where)
    return str(where)


def python(code: str, *arguments: str, stderr: int = subprocess.PIPE) -> tuple[str, str]:
    """The output and the errors of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_the_logger_is_silent_until_someone_asks() -> None:
    tell = "import logging, qpass; logging.getLogger('qpass').warning('a step')"
    assert python(tell) == ("", "")
    ask = "from qpass.cli.main import run; run(['--verbose', 'recipes', 'w8a8']);"
    assert "WARNING qpass: a step" in python(ask + tell)[1]


def test_a_pipe_gets_the_result_only(folder: str, tmp_path: Path) -> None:
    out, errors = python(COMMAND, "quantize", folder, "-r", "w8a16", "-o", str(tmp_path / "out"))
    assert errors == ""
    assert len(out.splitlines()) == 3


def test_a_terminal_gets_progress(folder: str) -> None:
    pty = pytest.importorskip("pty", reason="this system has no terminals to pretend")
    reads, writes = pty.openpty()
    options = ("--eager", "--prompt", "3", "--tokens", "1", "--repetitions", "1")
    python(COMMAND, "bench", folder, *options, stderr=writes)
    os.close(writes)
    assert b"compile and time" in os.read(reads, 2**16)
    os.close(reads)
