"""`qpass export`: how does a model become a file that ONNX Runtime runs?"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpass.cli.output import AsJson, emit
from qpass.cli.source import Model, load

if TYPE_CHECKING:
    from torch import nn

    from qpass.ir import Note
    from qpass.report import Table
    from qpass.targets.onnx_qdq import OnnxReport


def export(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    target: Annotated[
        str, typer.Option(help="Which operators the file uses; qdq: standard ones, opset 21.")
    ] = "qdq",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Run the file and compare it with the model before it takes its name; "
            "by default where onnxruntime is installed.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model, quantized or float, as an ONNX file, and run it beside PyTorch.

    Large tensors lie in a second file beside it.
    """
    from qpass.export import check_target, export_onnx

    # whatever can be wrong is looked at before the first long step
    check_target(output, target, verify)
    loaded = load(model)
    widened = _widen(loaded.model)
    report = export_onnx(loaded.model, loaded.inputs, output, target=target, verify=verify)
    if as_json:
        emit({"onnx": report, "widened": widened}, as_json=True)
    else:
        emit({"notes": _notes(report.notes)} if report.notes else {}, as_json=False)
        emit({"written": _text(report, widened)}, as_json=False)


def _widen(model: nn.Module) -> bool:
    """Let `model` compute in float32 where ONNX Runtime has few operators for its own type."""
    import torch

    if not any(t.dtype is torch.bfloat16 for t in (*model.parameters(), *model.buffers())):
        return False
    model.float()
    return True


def _notes(notes: tuple[Note, ...]) -> Table:
    """One row for each reason: models repeat their layers, and so their reasons."""
    from qpass.report import Table

    places: dict[str, list[str]] = collections.defaultdict(list)
    for note in notes:
        places[note.why].append(note.where)
    rows = tuple((where[0], len(where), why) for why, where in places.items())
    return Table("notes", ("first at", "times", "why"), rows)


def _text(report: OnnxReport, widened: bool) -> str:
    from qpass.report import megabytes

    size = f"{megabytes(report.bytes):.4g} MB in {' and '.join(f.name for f in report.files)}"
    lines = [f"{report.path}: {size}, opset {report.opset}"]
    if widened:
        lines.append("the model computes in bfloat16; the file computes in float32")
    if report.linears:
        lines.append(
            f"{report.linears} products with integer weights, of which ONNX Runtime computes "
            f"{report.fusible} without decoding them first"
        )
    if report.parity is None:
        lines.append("not verified: ONNX Runtime did not run it")
    else:
        lines.append(f"largest relative error against PyTorch: {report.parity.error:.2g}")
    return "\n".join(lines)
