"""`qpass eval`: how far is a model from its reference?"""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpass.cli import gates
from qpass.cli.output import AsJson, emit
from qpass.cli.source import Model, load
from qpass.cli.text import Length, Tokenizer, Windows, followed, read_windows
from qpass.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from qpass.report import Table


class Sites(enum.StrEnum):
    """How the cost of each site is found."""

    PREDICTED = "predicted"
    MEASURED = "measured"


# sites that people are shown
SHOWN = 10


def evaluate(
    model: Model,
    reference: Annotated[str, typer.Option(help="The model to compare with, named like MODEL.")],
    text: Annotated[Path | None, typer.Option(help="A text file to measure on.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Multiple choice: a .jsonl file with a context, choices and an answer in each "
            "line, or a task of lm-eval by its name or .yaml file, where lm-eval is installed."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many questions of each task.")
    ] = None,
    sites: Annotated[
        Sites | None,
        typer.Option(
            help="What each quantized site costs: predicted from gradients, or also measured, "
            "one site at a time on a few windows. REFERENCE is then the float model."
        ),
    ] = None,
    gate: gates.Gates = None,
    tokenizer: Tokenizer = None,
    length: Length = 512,
    windows: Windows = 40,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, KL, agreement, size and multiple choice against a reference."""
    import qpass
    from qpass.report import progress

    limits = gates.parse(gate or ())
    if text is None and (limits or sites is not None or not tasks):
        raise BadInput("there is nothing to measure on: add --text FILE, or --tasks alone")
    batches = read_windows(tokenizer or reference, text, length, windows)
    loaded, other = load(model).model, load(reference).model
    result: dict[str, object] = {}
    failed: list[str] = []
    if batches is not None:
        how = None if sites is None else sites.value
        with progress() as advance:
            following = followed(advance, "compare with the reference", batches)
            told = functools.partial(advance, "cost of each site")
            found = qpass.evaluate(loaded, other, following, budget=how, advance=told)
        failed = gates.failures(limits, found)
        result = {"quality": found, "gate": failed}
    if tasks:
        pair = {model: loaded, reference: other}
        result["tasks"] = _tasks(pair, tokenizer or reference, tasks, limit)
    emit(result if as_json else _shown(model, result), as_json=as_json)
    for why in failed:
        sys.stderr.write(f"qpass: gate failed: {why}\n")
    if failed:
        raise typer.Exit(gates.FAILED)


def _tasks(
    models: Mapping[str, nn.Module], tokenizer: str, tasks: Sequence[str], limit: int | None
) -> Table:
    """One row for each number of each task."""
    from qpass.hf.harness import score_tasks
    from qpass.hf.pretrained import load_tokenizer
    from qpass.report import Table
    from qpass.report.quality import estimate_text

    words = load_tokenizer(tokenizer)
    every = [score_tasks(model, words, tasks, limit) for model in models.values()]
    rows = tuple(
        (found[0].task, found[0].metric, *(estimate_text(one.value) for one in found))
        for found in zip(*every, strict=True)
    )
    return Table("tasks", ("task", "metric", *models), rows)


def _shown(model: str, result: Mapping[str, object]) -> dict[str, object]:
    from qpass.report.quality import budget_table, quality_table, sites_table
    from qpass.verify import Evaluation

    tables: dict[str, object] = {}
    found = result.get("quality")
    if isinstance(found, Evaluation):
        tables["quality"] = quality_table("quality", {model: found})
        if found.sites:
            tables["sites"] = _worst(sites_table(found))
        if found.budget is not None:
            tables["budget"] = budget_table(found.budget)
    return {**tables, "tasks": result.get("tasks")}


def _worst(sites: Table) -> Table:
    """The first rows: those that lose most."""
    from qpass.report import Table

    if len(sites.rows) <= SHOWN:
        return sites
    title = f"{sites.title}: the {SHOWN} worst of {len(sites.rows)}, --json has all"
    return Table(title, sites.columns, sites.rows[:SHOWN])
