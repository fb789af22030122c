"""Is the table of kernels made of what was measured?"""

from __future__ import annotations

import dataclasses

import pytest

from qpass.runtime.roofline import Limits
from tests.bench.table import BEGIN, END, Cell, replaced, table

LIMITS = Limits(1, ((2**20, 100.0), (2**40, 10.0)), integer=1.0, bfloat16=0.5, float32=0.25)


def cell(product: str, outputs: int, inputs: int, rows: int) -> Cell:
    return Cell("avx2", product, outputs, inputs, rows, 1)


def test_the_text_between_the_marks_is_replaced() -> None:
    readme = f"before\n{BEGIN}old\n\n| a |\n{END}after\n"
    assert replaced(readme, r"new \1" + "\n") == f"before\n{BEGIN}new \\1\n{END}after\n"
    assert replaced(f"{BEGIN}{END}", "x\n") == f"{BEGIN}x\n{END}"
    with pytest.raises(ValueError, match="no marks"):
        replaced("nothing", "x")


def test_bytes_of_a_weight_and_of_rows() -> None:
    assert cell("w8a8", 64, 32, 4).bytes == 64 * 32 + 4 * 64
    # two float16 numbers for each group of 32
    assert cell("w4a8", 64, 32, 4).bytes == 64 * 16 + 4 * 64 + 4 * 64
    assert cell("w4a16-g64", 64, 64, 4).bytes == 64 * 32 + 4 * 64 + 2 * 64
    assert cell("rotate, int8", 0, 32, 4).bytes == 4 * 32 * 5


def test_the_part_of_a_limit() -> None:
    # many rows multiply at the peak, few wait for memory
    many = cell("w8a8", 2**10, 2**10, 512)
    assert many.fraction(2 * 512 * 2**20 / 1e12, LIMITS) == pytest.approx(1)
    floats = cell("w4a16-g64", 2**10, 2**10, 512)
    assert floats.fraction(2 * 512 * 2**20 / 0.25e12, LIMITS) == pytest.approx(1)
    few = cell("w8a8", 2**10, 2**10, 1)
    assert few.copies > 1
    reading = few.bytes / LIMITS.bandwidth(few.bytes * few.copies) / 1e9
    assert few.fraction(2 * reading, LIMITS) == pytest.approx(0.5)


def test_a_line_for_each_product_and_a_cell_for_each_count() -> None:
    cells = [cell("w8a8", 1024, 1024, rows) for rows in (1, 512)]
    known = {cells[1].name: {"us": 2147.483648}, cells[1].limits: dataclasses.asdict(LIMITS)}
    lines = table(cells, known).splitlines()
    assert "| avx2 | w8a8, 1024 -> 1024 | - | - | - | - | 2147 (50%) |" in lines
    assert any(line.startswith("| avx2 | int8 1 Tops/s") for line in lines)
