"""`qpass eval`: how far is a model from its reference?"""

from __future__ import annotations

import enum
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qpass.cli import gates
from qpass.cli.output import AsJson, emit
from qpass.cli.source import Model, load
from qpass.cli.text import Length, Tokenizer, Windows, followed, read_windows

if TYPE_CHECKING:
    from qpass.report import Table


class Sites(enum.StrEnum):
    """How the cost of each site is found."""

    PREDICTED = "predicted"
    MEASURED = "measured"


# sites that people are shown
SHOWN = 10


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="A text file to measure on.")],
    reference: Annotated[str, typer.Option(help="The model to compare with, named like MODEL.")],
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
    """Measure perplexity, KL divergence, agreement and size against a reference."""
    import qpass
    from qpass.report import progress
    from qpass.report.quality import budget_table, quality_table, sites_table

    limits = gates.parse(gate or ())
    batches = read_windows(tokenizer or reference, text, length, windows) or ()
    pair = load(model).model, load(reference).model
    how = None if sites is None else sites.value
    with progress() as advance:
        following = followed(advance, "compare with the reference", batches)
        told = functools.partial(advance, "cost of each site")
        found = qpass.evaluate(*pair, following, budget=how, advance=told)
    failed = gates.failures(limits, found)
    if as_json:
        emit({"quality": found, "gate": failed}, as_json=True)
    else:
        tables = {"quality": quality_table("quality", {model: found})}
        if found.sites:
            tables["sites"] = _worst(sites_table(found))
        if found.budget is not None:
            tables["budget"] = budget_table(found.budget)
        emit(tables, as_json=False)
    for why in failed:
        sys.stderr.write(f"qpass: gate failed: {why}\n")
    if failed:
        raise typer.Exit(gates.FAILED)


def _worst(sites: Table) -> Table:
    """The first rows: those that lose most."""
    from qpass.report import Table

    if len(sites.rows) <= SHOWN:
        return sites
    title = f"{sites.title}: the {SHOWN} worst of {len(sites.rows)}, --json has all"
    return Table(title, sites.columns, sites.rows[:SHOWN])
