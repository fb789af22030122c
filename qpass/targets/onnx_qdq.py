"""How a call of a module becomes an ONNX file with its weights as integers and scales."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpass.capture.export import evaluating
from qpass.capture.hush import hushed
from qpass.errors import BadInput, CaptureFailed, Unsupported
from qpass.ir import Note
from qpass.targets.guard import suspended
from qpass.targets.onnx_layers import FLOATS, FUSED_BLOCKS, NIBBLES, OPSET, standing_in

if TYPE_CHECKING:
    import onnx_ir as ir

    from qpass.targets.onnx_run import Parity

INSTALL = "pip install 'qpass[onnx]'"
# one protobuf message ends at 2 GiB; far below it, a file that can be mapped is the better one
LARGEST_INLINE = 256 * 2**20
DIGEST = 16  # hexadecimal digits


@final
@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of `module` with keyword arguments that are trees of tensors, and names for them.

    `traced` are the arguments to trace with, in which every size that `sizes` leaves open is at
    least 2; `sample` are those to compare on. Names go by the order of the leaves.
    """

    module: nn.Module
    traced: Mapping[str, object]
    sample: Mapping[str, object]
    sizes: object
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What was written: `linears` have integer weights, of which `fusible` never become floats.

    `files` are the file and, where it is large, the one with its tensors; `bytes` is their sum.
    `parity` is None where ONNX Runtime did not run it.
    """

    path: Path
    files: tuple[Path, ...]
    opset: int
    bytes: int
    linears: int
    fusible: int
    notes: tuple[Note, ...]
    parity: Parity | None = None


def write(call: Call, path: Path, accept: Callable[[Path], None] | None = None) -> OnnxReport:
    """Write `call` as an ONNX file; an interrupted run leaves the old file or none.

    `accept` gets the file before it takes its name, and may raise.
    Raises BadInput for a path that cannot be written, CaptureFailed where there is no graph.
    """
    check(path)
    _check_dtype(call.module)
    with (
        suspended(call.module),
        standing_in(call.module) as (module, notes),
        evaluating(module),
    ):
        model = _exported(call, module)
    linears, fusible = _finish(model)
    try:
        files = _save(model, path, accept)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error
    size = sum(file.stat().st_size for file in files)
    return OnnxReport(path, files, model.opset_imports[""], size, linears, fusible, notes)


def check(path: Path) -> None:
    """Raise unless the exporter is installed and `path` can be written."""
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        raise Unsupported(f"ONNX export needs {' and '.join(missing)}; {INSTALL}")
    if path.is_dir():
        raise BadInput(f"{path} is a directory; name the file to write, such as {path}/model.onnx")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}; create it first")
    try:
        # permissions alone do not tell: file systems can be read-only, and root passes every check
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error


def _check_dtype(module: nn.Module) -> None:
    dtypes = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    if odd := dtypes - {torch.float32, torch.float16}:
        raise Unsupported(
            f"the model computes in {', '.join(sorted(map(str, odd)))}, which ONNX Runtime has few "
            "operators for; call model.float() first"
        )


def _exported(call: Call, module: nn.Module) -> ir.Model:
    with hushed():
        try:
            program = torch.onnx.export(
                module,
                kwargs=dict(call.traced),
                dynamic_shapes=call.sizes,  # pyright: ignore[reportArgumentType]
                input_names=call.inputs,
                output_names=call.outputs,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise CaptureFailed(
                f"torch.onnx.export cannot write {type(module).__name__}: {first}"
            ) from error
    if program is None:
        raise CaptureFailed(f"torch.onnx.export gave nothing for {type(module).__name__}")
    return program.model


def _finish(model: ir.Model) -> tuple[int, int]:
    """Store 4-bit codes in 4 bits and drop traces of the machine; count integer weights."""
    for value in model.graph.initializers.values():
        if value.name is not None and value.name.rpartition(".")[2] == NIBBLES:
            _narrow(value)
    linears = fusible = 0
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                value.metadata_props.clear()
        if node.op_type == "DequantizeLinear" and _stored(node):
            linears += 1
            block = node.attributes.get_int("block_size", 0)
            # a weight that two products share is decoded for both
            alone = len(node.outputs[0].uses()) == 1
            fusible += alone and (block == 0 or block in FUSED_BLOCKS) and not _floats(node)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = "qpass"
    model.producer_name = "qpass"
    model.producer_version = None
    return linears, fusible


def _stored(node: ir.Node) -> bool:
    """Whether what a node decodes lies in the file: it is a weight, not a value."""
    codes = node.inputs[0]
    return codes is not None and codes.producer() is None


def _floats(node: ir.Node) -> bool:
    """Whether the codes that a node decodes are floats, which no product takes as they are."""
    codes = node.inputs[0]
    return codes is not None and (codes.name or "").rpartition(".")[2] == FLOATS


def _narrow(value: ir.Value) -> None:
    import ml_dtypes
    import onnx_ir as ir

    if value.const_value is None:
        raise CaptureFailed(f"{value.name} has no data in the exported graph")
    codes = value.const_value.numpy().astype(ml_dtypes.int4)
    value.const_value = ir.tensor(codes, dtype=ir.DataType.INT4, name=value.name)
    value.dtype = ir.DataType.INT4


def _save(model: ir.Model, path: Path, accept: Callable[[Path], None] | None) -> tuple[Path, ...]:
    import onnx_ir as ir

    data = _data_name(model, path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        ir.save(model, Path(folder) / path.name, external_data=data)
        if accept is not None:
            accept(Path(folder) / path.name)
        files = (path,) if data is None else (path, path.with_name(data))
        # the tensors first: their name is new, and the file that refers to them takes one rename
        for file in reversed(files):
            os.replace(Path(folder) / file.name, file)
    old = "[0-9a-f]" * DIGEST
    for file in path.parent.glob(f"{_escaped(path.name)}.{old}.data"):
        if file not in files:
            file.unlink()
    return files


def _data_name(model: ir.Model, path: Path) -> str | None:
    """A name that says what the tensors are, None where they fit into the file."""
    values = sorted(model.graph.initializers.items())
    tensors = [(name, value.const_value) for name, value in values if value.const_value is not None]
    if sum(tensor.nbytes for _, tensor in tensors) <= LARGEST_INLINE:
        return None
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
        digest.update(tensor.tobytes())
    return f"{path.name}.{digest.hexdigest()[:DIGEST]}.data"


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def leaves(tree: object) -> list[Tensor]:
    """The tensors of a call's arguments or results, in the order of their names."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
