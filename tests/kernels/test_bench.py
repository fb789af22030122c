"""Does the benchmark refuse to time what is wrong, and record what it measured on?"""

import json
from pathlib import Path

import pytest
import torch

from tests.bench import kernels


def test_a_wrong_result_is_not_timed() -> None:
    want = torch.ones(3, dtype=torch.float64)
    right = kernels.Variant("right", (lambda: torch.ones(3),), want, 1e-6, 12, 3)
    wrong = kernels.Variant("wrong", (lambda: torch.zeros(3),), want, 1e-6, 12, 3)
    first, second = kernels.measure("3", [wrong, right], 0.001)
    assert first.name == "right"
    assert first.median_us > 0
    assert second.median_us != second.median_us
    assert second.error == 1


def test_all_variants_agree_and_the_record_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 2**16)
    monkeypatch.setattr(kernels, "ROTATIONS", ((48, 3, 16),))
    monkeypatch.setattr(kernels, "ATTENTIONS", ((4, 2, 1, 20, 8), (4, 2, 9, 20, 8)))
    path = tmp_path / "bench.json"
    threads = ["--threads", str(torch.get_num_threads())]
    shape = ["--layers", "33x64", "--rows", "1", "20"]
    kernels.main([*threads, *shape, "--seconds", "0.001", "--json", str(path)])
    record = json.loads(path.read_text())
    assert record["commit"]
    assert record["device"]["torch"] == torch.__version__
    for result in record["results"]:
        assert result["median_us"] > 0, result
