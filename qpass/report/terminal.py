"""How do tables and progress look on a terminal, and in a pipe?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TextIO

from qpass.report.table import Table, cell_text

# called with the name of a step, how much of it is done, and how much there is
Progress = Callable[[str, int, int], None]


def show(table: Table, file: TextIO | None = None) -> None:
    """Write a table: ruled and wrapped to the width of a terminal, plain in a pipe."""
    out = sys.stdout if file is None else file
    if not out.isatty():
        out.write(f"{table.text()}\n")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    rich = RichTable(title=escape(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        justify = "right" if table.numeric(index) else "left"
        rich.add_column(escape(column), justify=justify, overflow="fold")
    for row in table.rows:
        rich.add_row(*(escape(cell_text(cell)) for cell in row))
    Console(file=out).print(rich)


@contextmanager
def progress(file: TextIO | None = None) -> Generator[Progress]:
    """A function that draws one bar for each step, with the time left, and nothing in a pipe."""
    out = sys.stderr if file is None else file
    if not out.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Bars(*columns, console=Console(file=out), transient=True, speed_estimate_period=300)
    tasks: dict[str, TaskID] = {}

    def advance(step: str, done: int, total: int) -> None:
        if step not in tasks:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done, total=total)

    with bars:
        yield advance


def _silent(step: str, done: int, total: int) -> None:
    """Nothing: a pipe gets results only."""
