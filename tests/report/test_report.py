"""Do results read the same in every pipe, and as valid JSON?"""

from __future__ import annotations

import enum
import io
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from qpass.formats import QuantSpec
from qpass.ir import Note
from qpass.plan import Declined, Plan, Quantized, Recipe, Role, Rotated
from qpass.report import Table, json_text, megabytes, notes_table, plan_table, progress, show
from qpass.rotations import Transform

FLOATS = QuantSpec("e2m1", 32, scale_format="e8m0", dynamic=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TABLE = Table(
    "sizes",
    ("name", "MB", "kept"),
    (("embedding [int8]", 28.31552, True), ("head", None, False), ("a, b", 7, None)),
)


def test_plain_text_is_aligned_and_never_cut() -> None:
    assert TABLE.text() == (
        "sizes\n"
        "name                 MB  kept\n"
        "----------------  -----  ----\n"
        "embedding [int8]  28.32  yes\n"
        "head                  -  no\n"
        "a, b                  7  -\n"
    )
    long = "x" * 500
    assert long in Table("", ("why",), ((long,),)).text()


def test_a_pipe_gets_plain_text_and_a_terminal_a_ruled_table() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    show(TABLE, pipe)
    show(TABLE, terminal)
    assert pipe.getvalue() == f"{TABLE.text()}\n"
    assert "━" in terminal.getvalue()
    # square brackets in data are not markup
    assert "embedding [int8]" in terminal.getvalue()


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells in 3 columns"):
        Table("t", ("a", "b", "c"), ((1, 2),))


def test_progress_draws_on_a_terminal_only() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    for file in (pipe, terminal):
        with progress(file) as advance:
            advance("layers", 0, 3)
            advance("layers", 3, 3)
    assert pipe.getvalue() == ""
    assert "layers" in terminal.getvalue()


def test_progress_says_how_much_time_is_left() -> None:
    terminal = Terminal()
    with progress(terminal) as advance:
        for done in range(4):
            advance("layers", done, 10**6)
            time.sleep(0.02)
    assert re.search(r"left .*\d:\d\d:\d\d", terminal.getvalue())


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    colour: Colour
    where: Path


def test_json_keeps_structure_and_holds_no_nan() -> None:
    value = {
        "inner": Inner(Colour.RED, Path("a/b")),
        "numbers": (1, 2.5, math.nan, math.inf, True),
        "set": frozenset({"b", "a"}),
        "table": TABLE,
    }
    read = json.loads(json_text(value))
    assert read["inner"] == {"colour": "red", "where": "a/b"}
    assert read["numbers"] == [1, 2.5, None, None, True]
    assert read["set"] == ["a", "b"]
    assert read["table"][1] == {"name": "head", "MB": None, "kept": False}


def test_what_has_no_form_in_json_is_an_error() -> None:
    with pytest.raises(TypeError, match="object has no form"):
        json_text({"a": object()})


def test_refusals_come_first_and_keep_their_reason() -> None:
    notes = (Note(True, "norm", "gain folded"), Note(False, "softmax", "has no rule"))
    table = notes_table("notes", notes)
    assert table.rows == (
        ("declined", "softmax", "has no rule"),
        ("done", "norm", "gain folded"),
    )


def test_every_choice_of_a_plan_is_a_row() -> None:
    plan = Plan(
        Recipe("mine"),
        rotated=(Rotated("v", Transform("hadamard", 24, heads=3)),),
        quantized=(
            Quantized("a", Role.LINEAR, QuantSpec("e2m1"), None, "nearest"),
            Quantized("b", Role.LINEAR, QuantSpec("int8"), FLOATS, "nearest"),
            Quantized("c", Role.LINEAR, QuantSpec("e4m3"), None, "nearest"),
        ),
        declined=(Declined("scores", "softmax"),),
    )
    slow = ", on the reference path, without kernels"
    assert plan_table(plan).rows == (
        ("rotated", "v", "hadamard, 3 heads of width 24"),
        ("quantized", "a", "e2m1 weight, float input, nearest"),
        ("quantized", "b", f"int8 weight, e2m1 input, nearest{slow}"),
        ("quantized", "c", f"e4m3 weight, float input, nearest{slow}"),
        ("declined", "scores", "softmax"),
    )


def test_a_megabyte_is_a_million_bytes() -> None:
    assert megabytes(1_500_000) == 1.5
