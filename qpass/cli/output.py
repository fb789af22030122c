"""Where does a command's result go: tables for people, or one JSON document?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def emit(result: Mapping[str, object], *, as_json: bool) -> None:
    """Print what `result` holds by name; without JSON, its tables and strings in order."""
    from qpass.report import Table, json_text, show

    if as_json:
        sys.stdout.write(json_text(result))
        return
    for value in result.values():
        if isinstance(value, Table):
            show(value)
        elif isinstance(value, str):
            sys.stdout.write(f"{value}\n")
