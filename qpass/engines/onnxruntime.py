"""ONNX Runtime: the exported model, its weights int8 by channel, activations when they are read."""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from qpass.engines.base import ENGINES, PAST, PRESENT, Engine, Source, feeds


@final
class OnnxRuntime(Engine):
    """Dynamic int8, as its own tool quantizes."""

    name = "ONNX Runtime int8"
    needs = ("onnxruntime", "onnx")

    def open(self, source: Source) -> Session:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path = source.folder / "int8.onnx"
        quantize_dynamic(
            source.onnx, path,
            op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=QuantType.QInt8, use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return Session(str(path), source.threads)


@final
class Session:
    """A graph that takes a cache and gives one; caches stay in the runtime."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._value: Any = ort.OrtValue
        self._session: Any = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]
        self._empty = {
            node.name: self._value.ortvalue_from_numpy(
                np.zeros((1, node.shape[1], 0, node.shape[3]), dtype=np.float32)
            )
            for node in self._session.get_inputs()
            if node.name.startswith(PAST)
        }
        self.forget()

    def forget(self) -> None:
        """Begin another sequence."""
        self._cache, self._read = dict(self._empty), 0

    def next(self, tokens: Tensor) -> Tensor:
        """Read `tokens [1, t]`; the likeliest that comes next, `[1, 1]`."""
        plain = feeds(tokens, self._read, self._inputs)
        given = {name: self._value.ortvalue_from_numpy(value) for name, value in plain.items()}
        found = self._session.run_with_ort_values(self._outputs, {**given, **self._cache})
        results = dict(zip(self._outputs, found, strict=True))
        self._cache = {name: results[name.replace(PAST, PRESENT)] for name in self._cache}
        self._read += tokens.shape[1]
        return torch.from_numpy(results["logits"].numpy()[:, -1:].argmax(-1))


ENGINES.add(OnnxRuntime())
