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

from tests.bench.engines.worker import Prompts, Setting, main


class Generator:
    def __init__(self, model: og.Model, setting: Setting) -> None:
        self._model, self._setting = model, setting
        self._running: og.Generator | None = None

    def prefill(self, prompts: Prompts) -> np.ndarray:
        params = og.GeneratorParams(self._model)
        room, batch = self._setting.room, self._setting.batch
        params.set_search_options(max_length=room, batch_size=batch, do_sample=False)
        if batch > 1:
            # sequences go on behind the token that ends them, as everybody's do here
            params.set_search_options(min_length=room)
        self._running = og.Generator(self._model, params)
        return self._read(np.array(prompts, dtype=np.int32))

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        if len(tokens) == 1:
            return self._read(np.array([tokens], dtype=np.int32))
        # of several sequences only what it chose itself goes on, which is what it is told
        assert self._running is not None
        self._running.generate_next_token()
        return self._running.get_logits()[:, -1]

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        assert self._running is not None
        self._running.append_tokens(tokens if len(tokens) > 1 else tokens[0])
        return self._running.get_logits()[:, -1]


def load(variant: str, path: Path, setting: Setting) -> Generator:
    config = og.Config(str(path))
    options = {"session_options": {"intra_op_num_threads": setting.threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return Generator(og.Model(config), setting)


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
