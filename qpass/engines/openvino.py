"""OpenVINO: the exported model with its cache as a state, weights int8 by nncf."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from qpass.engines.base import ENGINES, PAST, PRESENT, Engine, Source, feeds


@final
class OpenVino(Engine):
    """Weights in 8 bits, symmetric, and float activations."""

    name = "OpenVINO int8"
    needs = ("openvino", "nncf")

    def open(self, source: Source) -> Request:
        import nncf  # pyright: ignore[reportMissingImports]
        import openvino  # pyright: ignore[reportMissingImports]

        library: Any = openvino
        core = library.Core()
        symmetric = nncf.CompressWeightsMode.INT8_SYM
        model = nncf.compress_weights(core.read_model(source.onnx), mode=symmetric)
        _keep_cache(model)
        settings = {
            "INFERENCE_NUM_THREADS": source.threads,
            "PERFORMANCE_HINT": "LATENCY",
            # of such graphs its plug-in computes something else (2026.4) with weights that have
            # offsets, and where it rounds activations too
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        return Request(core.compile_model(model, "CPU", settings).create_infer_request())


@final
class Request:
    """A graph that keeps its cache between calls."""

    def __init__(self, request: Any) -> None:  # noqa: ANN401
        self._request = request
        self._inputs = {name for port in request.model_inputs for name in port.get_names()}
        self._read = 0

    def forget(self) -> None:
        """Begin another sequence."""
        self._request.reset_state()
        self._read = 0

    def next(self, tokens: Tensor) -> Tensor:
        """Read `tokens [1, t]`; the likeliest that comes next, `[1, 1]`."""
        found = self._request.infer(feeds(tokens, self._read, self._inputs))
        self._read += tokens.shape[1]
        return torch.from_numpy(found["logits"][:, -1:].argmax(-1))


def _keep_cache(model: Any) -> None:  # noqa: ANN401
    """Caches of one sequence as states, which are empty at first."""
    from openvino._offline_transformations import (  # pyright: ignore[reportMissingImports]
        apply_make_stateful_transformation,
    )

    shapes: dict[str, list[int]] = {}
    states: dict[str, str] = {}
    for port in model.inputs:
        shape = [size.get_length() if size.is_static else -1 for size in port.partial_shape]
        shapes[port.any_name] = [1, *shape[1:]]
        if port.any_name.startswith(PAST):
            states[port.any_name] = port.any_name.replace(PAST, PRESENT)
    model.reshape(shapes)
    apply_make_stateful_transformation(model, states)


ENGINES.add(OpenVino())
