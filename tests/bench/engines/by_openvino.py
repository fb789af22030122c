"""OpenVINO: the model with its cache as a state, exported by optimum, weights compressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset15

from tests.bench.engines.worker import Prompts, Setting, main


class Stateful:
    def __init__(self, request: ov.InferRequest) -> None:
        self._request, self._read = request, 0

    def prefill(self, prompts: Prompts) -> np.ndarray:
        self._request.reset_state()
        self._read = 0
        return self._next(np.array(prompts, dtype=np.int64))

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        return self._next(np.array(tokens, dtype=np.int64)[:, None])

    def _next(self, tokens: np.ndarray) -> np.ndarray:
        batch, length = tokens.shape
        total = self._read + length
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((batch, total), dtype=np.int64),
            "position_ids": np.arange(self._read, total, dtype=np.int64)[None].repeat(batch, 0),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        self._read = total
        return self._request.infer(inputs)["logits"][:, -1]


def load(variant: str, path: Path, setting: Setting) -> Stateful:
    core = ov.Core()
    model = core.read_model(path / "openvino_model.xml")
    _last_token_only(model)
    settings = {"INFERENCE_NUM_THREADS": setting.threads, "PERFORMANCE_HINT": "LATENCY"}
    return Stateful(core.compile_model(model, "CPU", settings).create_infer_request())


def _last_token_only(model: ov.Model) -> None:
    """Logits of the last token, as every other engine computes them."""
    product = model.output("logits").get_node().input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    last = opset15.slice(
        product.input_value(0), np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array([1])
    )
    product.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def convert(variant: str, checkpoint: Path, out: Path) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    compressed = {
        "int4": OVWeightQuantizationConfig(bits=4, group_size=32, sym=False),
        "int8": OVWeightQuantizationConfig(bits=8),
    }
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, quantization_config=compressed[variant]
    )
    model.save_pretrained(out)


if __name__ == "__main__":
    main(load, convert)
