"""`qpass quantize`: how does a pipeline turn a model and a recipe into a smaller model?"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, final

import typer

from qpass.cli import gates
from qpass.cli.output import AsJson, check_folder, emit
from qpass.cli.source import Model, load
from qpass.cli.text import Length, Tokenizer, Windows, read_windows, tracked
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
        Path | None,
        typer.Option(help="A text, JSON lines or token ids that choices and rounding rest on."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="A directory for finished parts; the same command goes on from there."),
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
    from qpass.plan import Plan, Recipe
    from qpass.targets.checkpoint import check_room
    from qpass.verify.sites import state_megabytes

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
    carried_out = None if plan is None else Plan.load(plan)
    loaded = load(model)
    before = state_megabytes(loaded.model)
    done = qpass.quantize(
        loaded.model,
        wanted,
        calibration=batches,
        inputs=loaded.inputs,
        plan=carried_out,
        resume=resume,
    )
    found = None
    if measured is not None:
        with tracked("compare with the model", measured) as following:
            found = qpass.evaluate(done, load(model).model, following)
    failed = [] if found is None else gates.failures(limits, found)
    if not failed:
        qpass.save(done, output)
    _report(_Result(output, done, before, found, failed), as_json=as_json)
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


@final
@dataclass(frozen=True, slots=True)
class _Result:
    """What came of it: the model, how large it was in float, and how good it is."""

    output: Path
    model: nn.Module
    before: float
    found: Evaluation | None
    failed: Sequence[str]


def _report(result: _Result, *, as_json: bool) -> None:
    from qpass.quantize.containers import REFERENCE, by_reference
    from qpass.report import Table
    from qpass.report.quality import quality_table
    from qpass.report.table import collapsed
    from qpass.targets.record import record_of
    from qpass.verify.sites import state_megabytes

    plan = record_of(result.model).plans[-1]
    output, found, failed = result.output, result.found, result.failed
    size = state_megabytes(result.model)
    slow = sum(by_reference(entry.weight, entry.activation) for entry in plan.quantized)
    declined = Table("declined", ("where", "why"), tuple((d.where, d.why) for d in plan.declined))
    if as_json:
        counts = {"quantized": len(plan.quantized), "rotated": len(plan.rotated)}
        facts = {
            "output": None if failed else output,
            "megabytes": size,
            "float_megabytes": result.before,
            **counts,
            "online": len(plan.online),
            "without_kernels": slow,
            "declined": declined,
            "quality": found,
            "gate": failed,
        }
        emit(facts, as_json=True)
    else:
        tables: dict[str, object] = {}
        # why regions do not rotate is what `qpass inspect` explains; here it is what stays float
        kept = tuple(row for row in declined.rows if not str(row[1]).startswith("not rotated"))
        if kept:
            tables["declined"] = collapsed(Table("declined", declined.columns, kept), ("where",))
        if found is not None:
            tables["quality"] = quality_table("quality", {output.name: found})
        tables["size"] = f"{size:.4g} MB of weights instead of {result.before:.4g} MB"
        tables["plan"] = (
            f"{len(plan.quantized)} weights quantized, {len(plan.rotated)} regions rotated, "
            f"{len(plan.online)} rotations online"
            + (f", {slow} products {REFERENCE}" if slow else "")
        )
        if not failed:
            tables["saved"] = f"saved: {output}"
        emit(tables, as_json=False)
    for why in failed:
        sys.stderr.write(f"qpass: gate failed, {output} is not written: {why}\n")
