"""What is a table of results, and how does it read as plain text?"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

Cell = str | int | float | bool | None

_NUMBER = re.compile(r"\d+")


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns; None is a value that does not exist."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(row)} cells in {len(self.columns)} columns")

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, and so reads better flush right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(
            isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells
        )

    def text(self) -> str:
        """Aligned columns, never cut, the same in every terminal."""
        lines = [self.columns, *(tuple(map(cell_text, row)) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        right = [self.numeric(i) for i in range(len(self.columns))]
        lines.insert(1, tuple("-" * width for width in widths))
        body = "".join(f"{_padded(line, widths, right)}\n" for line in lines)
        return f"{self.title}\n{body}" if self.title else body

    def records(self) -> list[dict[str, Cell]]:
        """One mapping from column to cell for each row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def alike(table: Table, names: Collection[str]) -> list[list[int]]:
    """The rows, by their places, that differ in numbers of the columns `names` only."""
    masked = [column in names for column in table.columns]
    groups: dict[tuple[Cell, ...], list[int]] = {}
    for place, row in enumerate(table.rows):
        key = tuple(
            _NUMBER.sub("#", str(cell)) if mask else cell
            for cell, mask in zip(row, masked, strict=True)
        )
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def collapsed(table: Table, names: Collection[str]) -> Table:
    """One row for all that are `alike`, and how many they are.

    A number that is not the same in all of them becomes `*`, as in `layers.*.weight`.
    """
    groups = [[table.rows[place] for place in places] for places in alike(table, names)]
    rows = tuple((*map(_merged, zip(*group, strict=True)), len(group)) for group in groups)
    return Table(table.title, (*table.columns, "times"), rows)


def _merged(cells: Sequence[Cell]) -> Cell:
    first, *rest = cells
    if all(cell == first for cell in rest):
        return first
    numbers = [_NUMBER.findall(str(cell)) for cell in cells]
    same = [len(set(found)) == 1 for found in zip(*numbers, strict=True)]
    shown = iter(n if kept else "*" for n, kept in zip(numbers[0], same, strict=True))
    return _NUMBER.sub(lambda _: next(shown), str(first))


def cell_text(cell: Cell) -> str:
    """A cell as people read it: four significant digits, yes and no, a dash for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


def megabytes(size: int) -> float:
    """Bytes in units of 10^6."""
    return size / 1e6


def _padded(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = (
        cell.rjust(width) if flush else cell.ljust(width)
        for cell, width, flush in zip(line, widths, right, strict=True)
    )
    return "  ".join(cells).rstrip()
