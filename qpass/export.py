"""The calls that write a model for other runtimes, and compare what they compute from it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.utils import _pytree as pytree

from qpass.capture.call import Inputs, arguments
from qpass.capture.export import evaluating
from qpass.capture.sample import doubled, dynamic_shapes
from qpass.errors import BadInput
from qpass.ir import Note
from qpass.registry import unknown
from qpass.targets.onnx_qdq import Call, OnnxReport, check, leaves, write
from qpass.targets.onnx_run import Parity, compare

QDQ = "qdq"
TARGETS = (QDQ,)


def export_onnx(
    model: nn.Module, inputs: Inputs, path: str | Path, *, target: str = QDQ
) -> OnnxReport:
    """Write `model` as an ONNX file of standard operators (opset 21), sizes left open.

    Quantized weights stay integers with their scales, as `DequantizeLinear` in front of `MatMul`;
    a float model gives a float graph; activations stay float. A decoder takes `past_key_values.*`
    and gives `present.*`. Raises BadInput for inputs or a path that do not fit, Unsupported without
    the `onnx` extra and CaptureFailed where there is no graph.
    """
    if target not in TARGETS:
        raise unknown("ONNX target", target, TARGETS)
    check(Path(path))
    call, notes = _call(model, inputs)
    report = write(call, Path(path))
    return dataclasses.replace(report, notes=(*notes, *report.notes))


def onnx_parity(model: nn.Module, inputs: Inputs, path: str | Path) -> Parity:
    """How far ONNX Runtime, on the file at `path`, is from `model` on `inputs`."""
    return compare(_call(model, inputs)[0], Path(path))


def _call(model: nn.Module, inputs: Inputs) -> tuple[Call, tuple[Note, ...]]:
    signature = inspect.signature(model.forward)
    args, given = arguments(inputs, signature, {})
    if args:
        raise BadInput(
            f"{type(model).__name__}.forward takes arguments by position only; wrap it in a module "
            "whose arguments have names"
        )
    notes: tuple[Note, ...] = ()
    if "transformers" in sys.modules:
        from qpass.hf.cached import cached_call

        found = cached_call(model, given)
        if isinstance(found, Call):
            return found, ()
        if found is not None:
            notes = (Note(False, "cache", f"exported without a cache: {found}"),)
    return _plain(model, given, signature), notes


def _plain(model: nn.Module, given: dict[str, object], signature: inspect.Signature) -> Call:
    sample = dict(given)
    if "use_cache" in signature.parameters:
        # a cache is state that a graph cannot return; without it the outputs are the same
        sample["use_cache"] = False
    traced = doubled(((), sample))[1]
    with evaluating(model):
        result = model(**sample)
    return Call(
        module=model,
        traced=traced,
        sample=sample,
        sizes=dynamic_shapes(model, (), traced),
        inputs=_names(sample, "input"),
        outputs=_names(dict(result) if isinstance(result, Mapping) else result, "output"),
    )


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
