"""Results as people and programs read them."""

from qpass.report.notes import notes_table, plan_table
from qpass.report.table import Cell, Table, cell_text, megabytes
from qpass.report.terminal import Progress, progress, show
from qpass.report.values import json_text, plain

__all__ = [
    "Cell",
    "Progress",
    "Table",
    "cell_text",
    "json_text",
    "megabytes",
    "notes_table",
    "plain",
    "plan_table",
    "progress",
    "show",
]
