"""The calls that write a model for other runtimes, and compare what they compute from it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpass.capture.call import Inputs, arguments
from qpass.capture.export import check_devices, result_of
from qpass.capture.sample import doubled, dynamic_shapes
from qpass.errors import BadInput, ContractBroken, Unsupported, expect_instance
from qpass.hf.sample import sample_call
from qpass.ir import Note
from qpass.registry import unknown
from qpass.targets.layers import QuantizedLinear
from qpass.targets.onnx_layers import exported_rows
from qpass.targets.onnx_qdq import INSTALL, Call, OnnxReport, check, leaves, write
from qpass.targets.onnx_run import Opened, Parity, compare, runnable

QDQ = "qdq"
TARGETS = (QDQ,)
# relative error of an output: rounding in the model's type, through all of its layers
EXACT = 1e-3
LIMIT = {torch.float32: EXACT, torch.float16: 0.05}


def export_onnx(
    model: nn.Module,
    inputs: Inputs | None,
    path: str | Path,
    *,
    target: str = QDQ,
    verify: bool | None = None,
) -> OnnxReport:
    """Write `model` as an ONNX file of standard operators (opset 21), sizes left open.

    Quantized weights stay integers with their scales, as `DequantizeLinear` in front of `MatMul`;
    a float model gives a float graph; activations stay float. A decoder takes `past_key_values.*`
    and gives `present.*`. With `verify` (default: where onnxruntime is installed) ONNX Runtime
    computes `inputs` from the file before it takes its name. Raises BadInput for inputs or a path
    that do not fit, Unsupported without the `onnx` extra, CaptureFailed where there is no graph and
    ContractBroken for a file that computes something else.
    """
    check_target(path, target, verify)
    call, notes = _call(model, sample_call(model, inputs))
    if not (runnable() if verify is None else verify):
        report = write(call, Path(path))
    else:
        found: list[Parity] = []
        report = write(call, Path(path), lambda file: found.append(_verified(call, file)))
        report = dataclasses.replace(report, parity=found[0])
    return dataclasses.replace(report, notes=(*notes, *report.notes))


def check_target(path: str | Path, target: str, verify: bool | None = None) -> None:
    """Raise unless a file can be written at `path` for `target`, and verified if that is asked."""
    expect_instance((str, Path), "path", path, "where to write the file")
    if target not in TARGETS:
        raise unknown("ONNX target", target, TARGETS)
    check(Path(path))
    if verify and not runnable():
        raise Unsupported(f"verifying an ONNX file needs onnxruntime; {INSTALL}")


def onnx_parity(model: nn.Module, inputs: Inputs | None, path: str | Path) -> Parity:
    """How far ONNX Runtime, on the file at `path`, is from `model` on `inputs`."""
    return compare(_call(model, sample_call(model, inputs))[0], Path(path))


@final
class OnnxModel(nn.Module):
    """What ONNX Runtime computes from the file that `export_onnx` wrote of `model`.

    Called like the model; returns its outputs by name, such as `logits`, so that `qpass.evaluate`
    can compare the two.
    """

    def __init__(self, model: nn.Module, path: str | Path) -> None:
        super().__init__()
        # not a submodule: the file stands for it
        self._model = (model,)
        self._opened = Opened(Path(path))

    @property
    def operators(self) -> Mapping[str, int]:
        """How often each operator runs in ONNX Runtime's optimised graph."""
        return self._opened.operators

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        model = self._model[0]
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        call, _ = _call(model, dict(bound.arguments))
        feeds = dict(zip(call.inputs, leaves(dict(call.sample)), strict=True))
        return dict(zip(call.outputs, self._opened(feeds), strict=True))


def _verified(call: Call, file: Path) -> Parity:
    """How far the file is from the model, once it is what was exported of it."""
    with _float_activations(call.module) as changed:
        parity = compare(call, file)
    tensors = (*call.module.parameters(), *call.module.buffers())
    limit = max((LIMIT[t.dtype] for t in tensors if t.dtype in LIMIT), default=EXACT)
    if not parity.error <= limit:
        raise ContractBroken(
            f"ONNX Runtime does not compute from {file.name} what PyTorch computes: an output is "
            f"off by {parity.error:.1e} (limit {limit:.0e}); no file was written\n"
            "  please report this, with the model's code; verify=False writes the file all the same"
        )
    # what the file leaves out on purpose is part of the distance, but under no limit
    return compare(call, file) if changed else parity


@contextmanager
def _float_activations(model: nn.Module) -> Generator[bool]:
    """`model` as it is exported: only static activations are rounded; whether that is a change."""
    every = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    layers = [layer for layer in every if exported_rows(layer) is None]
    rounding = [(layer, layer.activation_bits, layer.activation) for layer in layers]
    try:
        for layer in layers:
            layer.activation_bits = layer.activation = None
        yield any(bits is not None or spec is not None for _, bits, spec in rounding)
    finally:
        for layer, bits, spec in rounding:
            layer.activation_bits, layer.activation = bits, spec


def _call(model: nn.Module, inputs: Inputs) -> tuple[Call, tuple[Note, ...]]:
    signature = inspect.signature(model.forward)
    args, given = arguments(inputs, signature, {})
    if args:
        raise BadInput(
            f"{type(model).__name__}.forward takes arguments by position only; wrap it in a module "
            "whose arguments have names"
        )
    sample = dict(given)
    if "use_cache" in signature.parameters:
        # a cache is state that a graph cannot return; without it the outputs are the same
        sample["use_cache"] = False
    check_devices(model, sample)
    result = result_of(model, (), sample)
    notes: tuple[Note, ...] = ()
    if "transformers" in sys.modules:
        from qpass.hf.cached import cached_call

        found = cached_call(model, given)
        if isinstance(found, Call):
            return found, ()
        if found is not None:
            notes = (Note(False, "cache", f"exported without a cache: {found}"),)
    traced = doubled(((), sample))[1]
    plain = Call(
        module=model,
        traced=traced,
        sample=sample,
        sizes=dynamic_shapes(model, (), traced),
        inputs=_names(sample, "input"),
        outputs=_names(dict(result) if isinstance(result, Mapping) else result, "output"),
    )
    return plain, notes


def _names(tree: object, whole: str) -> tuple[str, ...]:
    """A name for each tensor of a call's arguments or results: `logits`, `states.0`."""
    pairs = pytree.tree_flatten_with_path(tree)[0]
    wanted = {id(leaf) for leaf in leaves(tree)}
    names: list[str] = []
    for path, leaf in pairs:
        if id(leaf) in wanted:
            parts = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            names.append(".".join(parts) or whole)
    return tuple(names)
