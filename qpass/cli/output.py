"""Where does a command's result go: tables for people, or one JSON document?"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from qpass.errors import BadInput

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


def write_file(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise BadInput unless a file can be written at `path`."""
    if path.is_dir():
        raise BadInput(f"{path} is a directory; name the file to write")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no directory {path.parent}; create it first")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raise BadInput unless `folder` is, or can become, a directory that takes files."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; the output is a directory")
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        # permissions alone do not tell: file systems can be read-only, and root passes every check
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}: {nearest}") from error
