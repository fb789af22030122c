"""Is a checkpoint quantized in less memory than its own weights would take?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file

GIGABYTE = 10**9
# the command, with a limit on what is neither a file nor shared; the files of weights are mapped
# so that their pages can be dropped, but count as if they were not
LIMITED = """
import resource, sys
from qpass.cli.main import run
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(run(sys.argv[2:]))
"""


def checkpoint(where: Path, *, layers: int, vocabulary: int, width: int) -> int:
    """Write a decoder in bfloat16, a file for each layer, and return the bytes of its weights."""
    where.mkdir()
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        state = hf.AutoModelForCausalLM.from_config(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20 + 1, generator=generator).bfloat16()
    files: dict[str, list[str]] = {}
    for name in state:
        key = name.split(".")[2] if ".layers." in name else name.split(".")[0]
        files.setdefault(f"part-{key}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {}
        for name in names:
            shape = state[name].shape
            values = noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)
            tensors[name] = values * shape[-1] ** -0.5 if len(shape) > 1 else values + 2
        save_file(tensors, where / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(where)
    return sum(file.stat().st_size for file in where.glob("*.safetensors"))


def quantize(model: Path, output: Path, limit: int, *more: str) -> None:
    command = [sys.executable, "-c", LIMITED, str(limit)]
    arguments = ["quantize", str(model), "-r", "w4a16-g64", "-o", str(output), *more]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def stored(where: Path) -> dict[str, torch.Size]:
    found: dict[str, torch.Size] = {}
    for file in where.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  it has no other way
    return found


def test_a_wide_table_is_never_held_in_float64(tmp_path) -> None:
    size = checkpoint(tmp_path / "model", layers=1, vocabulary=2**16, width=1024)
    quantize(tmp_path / "model", tmp_path / "out", size + GIGABYTE)
    assert stored(tmp_path / "out")["lm_head.lines"] == [2**12, 256, 64]


@pytest.mark.slow
def test_a_model_larger_than_memory(tmp_path) -> None:
    size = checkpoint(tmp_path / "model", layers=14, vocabulary=128256, width=2048)
    assert size > 2 * GIGABYTE
    quantize(tmp_path / "model", tmp_path / "out", size + 2 * GIGABYTE)
    assert len(stored(tmp_path / "out")) > 14 * 7 * 2
