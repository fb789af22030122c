"""ONNX Runtime: graphs of its own builder, with its attention operator and a shared cache."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from tests.bench.engines.worker import main


class Generator:
    def __init__(self, model: og.Model, room: int) -> None:
        self._model, self._room = model, room
        self._running: og.Generator | None = None

    def prefill(self, tokens: Sequence[int]) -> int:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._room, do_sample=False)
        self._running = og.Generator(self._model, params)
        return self._read(tokens)

    def step(self, token: int) -> int:
        return self._read([token])

    def _read(self, tokens: Sequence[int]) -> int:
        assert self._running is not None
        self._running.append_tokens(np.array(tokens, dtype=np.int32))
        return int(np.argmax(self._running.get_logits()))


def load(variant: str, path: Path, threads: int, room: int) -> Generator:
    config = og.Config(str(path))
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return Generator(og.Model(config), room)


def convert(variant: str, checkpoint: Path, out: Path) -> None:
    if variant.startswith("int4"):
        _build(checkpoint, out, "int4", int4_accuracy_level=4, int4_block_size=32)
        return
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        whole = Path(folder)
        _build(checkpoint, whole, "fp32")
        _dynamic(whole, out)


def _build(checkpoint: Path, out: Path, precision: str, **extra: object) -> None:
    # logits of the last token alone, as every other engine computes them
    words = [f"{key}={value}" for key, value in {"prune_lm_head": "true", **extra}.items()]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
    with tempfile.TemporaryDirectory() as cache:
        files = ["-m", checkpoint, "-o", out, "-c", cache]
        options = ["-p", precision, "--extra_options", *words]
        done = subprocess.run([*builder, *files, *options], check=False)
    if done.returncode:
        # it has said why
        raise SystemExit(done.returncode)


def _dynamic(whole: Path, out: Path) -> None:
    """Weights of products become int8 by channel, activations when they are read."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out.mkdir(exist_ok=True)
    quantize_dynamic(
        whole / "model.onnx", out / "model.onnx",
        op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    (out / "genai_config.json").write_text((whole / "genai_config.json").read_text())


if __name__ == "__main__":
    main(load, convert)
