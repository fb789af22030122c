"""Does a second process take what the first one worked out, and notice when it no longer holds?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qpass.errors import BadInput
from qpass.runtime import disk

PROGRAM = """
import json
import torch
from torch import nn
from torch._dynamo.utils import counters

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

torch.manual_seed(0)
model = nn.Sequential(Block(), Block()).eval()
compiled = torch.compile(model, backend="qpass", options={"recipe": "w4a8"})
with torch.no_grad():
    out = compiled(torch.randn(5, 32))
plan = [counters["qpass"][f"plan_cache_{kind}"] for kind in ("hit", "miss")]
graphs = [counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss", "bypass")]
print(json.dumps([plan, graphs, out.double().sum().item()]))
"""


def process(folder: Path) -> tuple[list[int], list[int], float]:
    """Compile a model: hits and misses of both caches, and a sum of what it gives."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plan, graphs, result = json.loads(done.stdout.splitlines()[-1])
    return plan, graphs, result


def test_a_second_process_plans_and_compiles_nothing(tmp_path: Path) -> None:
    plan, graphs, want = process(tmp_path)
    assert (plan, graphs) == ([0, 1], [0, 1, 0])
    plan, graphs, got = process(tmp_path)
    assert (plan, graphs) == ([1, 0], [1, 0, 0])
    assert got == want


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.compiler.config.patch(force_disable_caches=False):
        yield tmp_path


def read(text: str) -> int:
    if not text.isdigit():
        raise BadInput("no number")
    return int(text)


def kept(made: list[int], key: str = "a") -> int:
    def make() -> int:
        made.append(7 + len(made))
        return made[-1]

    return disk.kept("number", key, make, read, str)


def test_what_was_made_is_read_again(folder: Path) -> None:
    made: list[int] = []
    assert [kept(made), kept(made), kept(made, "b")] == [7, 7, 8]
    assert sorted(path.name for path in (folder / disk.FOLDER).iterdir()) == [
        "number-a",
        "number-b",
    ]


def test_a_damaged_file_is_made_again(folder: Path) -> None:
    made: list[int] = []
    kept(made)
    for damage in (b"x", b"\xff\xfe", b""):
        (folder / disk.FOLDER / "number-a").write_bytes(damage)
        assert kept(made) == made[-1]
        assert kept(made) == made[-1]
    assert len(made) == 4


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    (folder / disk.FOLDER).write_text("a file where a folder should be")
    made: list[int] = []
    assert [kept(made), kept(made)] == [7, 8]


def test_no_caches_are_none(folder: Path) -> None:
    made: list[int] = []
    with torch.compiler.config.patch(force_disable_caches=True):
        assert [kept(made), kept(made)] == [7, 8]
    assert not list(folder.iterdir())


def test_fingerprints_tell_values_apart() -> None:
    x = torch.randn(3, 4)
    changed = x.clone()
    changed[1, 2] += 1e-6
    same = disk.fingerprint(["a", "bc"], [x])
    assert same == disk.fingerprint(["a", "bc"], [x.mT.contiguous().mT])
    others = [
        (["ab", "c"], [x]),
        (["a", "bc"], [changed]),
        (["a", "bc"], [x.reshape(4, 3)]),
        (["a", "bc"], [x.view(torch.int32)]),
        (["a", "bc"], [x, torch.empty(0)]),
    ]
    assert same not in [disk.fingerprint(*other) for other in others]
