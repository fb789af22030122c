"""`qpass quantize`: how does a pipeline turn a model and a recipe into a smaller model?"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qpass.cli import gates
from qpass.cli.output import AsJson, check_folder, emit
from qpass.cli.source import Model, load
from qpass.cli.text import Length, Tokenizer, Windows, read_windows
from qpass.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from qpass.verify import Evaluation


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.")],
    recipe: Annotated[
        str, typer.Option("-r", "--recipe", help="A preset (see `qpass recipes`) or a TOML file.")
    ] = "auto",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one field of the recipe."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Carry out a saved plan instead of a recipe.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text whose statistics the choices may rest on.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text to compare the result with the model on.")
    ] = None,
    gate: gates.Gates = None,
    tokenizer: Tokenizer = None,
    length: Length = 512,
    windows: Windows = 40,
    as_json: AsJson = False,
) -> None:
    """Rotate, quantize and save a model; with --gate, save it only if it is good enough."""
    import qpass
    from qpass.plan import Recipe
    from qpass.targets.checkpoint import check_room

    # whatever can be wrong is looked at before the first long step
    wanted = {"recipe": recipe, **_changes(changes or ())}
    Recipe.read(wanted)
    limits = gates.parse(gate or ())
    if limits and text is None:
        raise BadInput("a gate needs a text to measure on: add --text FILE")
    check_room(output)
    check_folder(output.absolute().parent)
    batches = read_windows(tokenizer or model, calibration, length, windows)
    measured = read_windows(tokenizer or model, text, length, windows)
    loaded = load(model)
    done = qpass.quantize(
        loaded.model, wanted, calibration=batches, inputs=loaded.inputs, plan=plan
    )
    found = None if measured is None else qpass.evaluate(done, load(model).model, measured)
    failed = [] if found is None else gates.failures(limits, found)
    if not failed:
        qpass.save(done, output)
    _report(output, done, found, failed, as_json=as_json)
    if failed:
        raise typer.Exit(gates.FAILED)


def _changes(given: Sequence[str]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for change in given:
        key, equals, value = change.partition("=")
        if not equals:
            raise BadInput(f"--set {change}: expected KEY=VALUE")
        try:
            read = tomllib.loads(f"{key} = {value}")
        except tomllib.TOMLDecodeError:
            # a bare word is a string, as anywhere on a command line
            try:
                read = tomllib.loads(f"{key} = {json.dumps(value)}")
            except tomllib.TOMLDecodeError as error:
                raise BadInput(f"--set {change}: {key!r} is no key") from error
        _merge(fields, read)
    return fields


def _merge(into: dict[str, object], more: Mapping[str, object]) -> None:
    """Add `more`, table by table."""
    for key, value in more.items():
        old = into.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            _merge(cast("dict[str, object]", old), cast("Mapping[str, object]", value))
        else:
            into[key] = value


def _report(
    output: Path,
    model: nn.Module,
    found: Evaluation | None,
    failed: Sequence[str],
    *,
    as_json: bool,
) -> None:
    from qpass.report.quality import quality_table
    from qpass.verify.sites import state_megabytes

    size = state_megabytes(model)
    if as_json:
        saved = None if failed else output
        result = {"output": saved, "megabytes": size, "quality": found, "gate": failed}
        emit(result, as_json=True)
    else:
        if found is not None:
            emit({"quality": quality_table("quality", {output.name: found})}, as_json=False)
        if not failed:
            emit({"saved": f"{output}: {size:.1f} MB of weights"}, as_json=False)
    for why in failed:
        sys.stderr.write(f"qpass: gate failed, {output} is not written: {why}\n")
