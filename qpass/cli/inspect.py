"""`qpass inspect`: what of a model can change basis, and why not the rest?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qpass.cli.output import AsJson, check_file, emit, write_file
from qpass.cli.source import Model, load


def inspect(
    model: Model,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page to read in a browser.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what may change basis and under which groups, matrix products, and why not more.

    Layers that are alike share a row; --json has one for each.
    """
    from qpass import api
    from qpass.report import page

    if html is not None:
        page.check()
        check_file(html)
    loaded = load(model)
    found = api.inspect(loaded.model, loaded.inputs)
    if html is not None:
        write_file(html, page.inspection_page(model, found))
    tables = (*(found.tables() if as_json else found.summary()), *found.costs())
    emit({table.title: table for table in tables if as_json or table.rows}, as_json=as_json)
