"""Does ONNX Runtime compute from a file what PyTorch computes, and with which operators?"""

from __future__ import annotations

import collections
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from qpass.capture.export import evaluating
from qpass.errors import BadInput, Unsupported
from qpass.targets.onnx_qdq import INSTALL, Call, leaves

# products with 4-bit weights in float32, as PyTorch computes them; the default rounds activations
EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "0")


@final
@dataclass(frozen=True, slots=True)
class Parity:
    """The largest relative error (Frobenius) of an output, and how often each operator runs.

    `operators` are those of ONNX Runtime's optimised graph: `MatMulNBits` is a product with an
    integer weight.
    """

    error: float
    operators: Mapping[str, int]


def compare(call: Call, path: Path) -> Parity:
    """Run `call` on its sample in PyTorch and, from the file at `path`, in ONNX Runtime."""
    with evaluating(call.module):
        wanted = leaves(call.module(**call.sample))
    feeds = dict(zip(call.inputs, leaves(dict(call.sample)), strict=True))
    got, operators = run(path, feeds)
    errors = [_relative(a, b) for a, b in zip(got, wanted, strict=True)]
    return Parity(max(errors, default=0.0), operators)


def run(path: Path, feeds: Mapping[str, Tensor]) -> tuple[Sequence[Tensor], Mapping[str, int]]:
    """The outputs of the file for inputs by name, and the operators of the optimised graph."""
    opened = Opened(path)
    return opened(feeds), opened.operators


@final
class Opened:
    """A file in ONNX Runtime, products with integer weights in float32 as PyTorch computes them.

    `operators` counts those of the optimised graph. Raises `BadInput` where there is no file and
    `Unsupported` where ONNX Runtime is absent or refuses it.
    """

    def __init__(self, path: Path) -> None:
        if not runnable():
            raise Unsupported(f"running an ONNX file needs onnxruntime; {INSTALL}")
        import onnx
        import onnxruntime

        if not path.is_file():
            raise BadInput(f"no such file: {path}")
        self._name = path.name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; what falls back to another kernel is no news
        options.add_session_config_entry(*EXACT_PRODUCTS)
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(optimised)
            # its tensors beside it: in one message they may not fit
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "optimised.data"
            )
            try:
                self._session = onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:
                raise self._refusal(error) from error
            graph = onnx.load(str(optimised), load_external_data=False).graph
        self.operators: Mapping[str, int] = collections.Counter(n.op_type for n in graph.node)

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs for inputs by name; those that the file does not take are left out."""
        known = {node.name for node in self._session.get_inputs()}
        given = {name: tensor.numpy() for name, tensor in feeds.items() if name in known}
        try:
            return [torch.from_numpy(array) for array in self._session.run(None, given)]
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> Unsupported:
        # its exceptions have no base of their own
        first = str(error).strip().partition("\n")[0]
        return Unsupported(f"ONNX Runtime cannot run {self._name}: {first}")


def runnable() -> bool:
    """Whether ONNX Runtime is there."""
    return importlib.util.find_spec("onnxruntime") is not None


def _relative(got: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    norm = float(wanted.norm())
    difference = float((got.double() - wanted).norm())
    return difference / norm if norm else difference
