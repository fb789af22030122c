"""How the limits of a machine, and what came close to them, read as tables."""

from __future__ import annotations

from collections.abc import Sequence

from qpass.report.table import Cell, Table
from qpass.runtime.products import Product
from qpass.runtime.roofline import Roofline


def machine_table(machine: Roofline) -> Table:
    """One row for each limit, one column for each number of threads."""
    names = [
        *(f"read {_binary(size)} again and again, GB/s" for size, _ in machine.all_threads.reads),
        f"int8, Tops/s ({machine.kernel or 'no compiled kernels'})",
        "bfloat16, Tops/s",
        "float32, Tops/s",
    ]
    columns: list[list[Cell]] = [
        [*(rate for _, rate in at.reads), at.integer, at.bfloat16, at.float32]
        for at in machine.limits
    ]
    threads = (f"{at.threads} thread{'s' * (at.threads > 1)}" for at in machine.limits)
    return Table(
        "what the machine can do", ("limit", *threads), tuple(zip(names, *columns, strict=True))
    )


def product_table(title: str, products: Sequence[Product]) -> Table:
    """One row for each distinct product, in the order given."""
    rows = tuple(
        (
            p.operator.replace("::", "."),
            p.tokens,
            f"{p.inputs} -> {p.outputs}",
            p.count,
            p.microseconds,
            p.gigabytes,
            p.teraoperations,
            p.fraction,
        )
        for p in products
    )
    columns = ("product", "tokens", "shape", "times", "us", "GB/s", "Tops/s", "of the limit")
    return Table(title, columns, rows)


def _binary(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size} {unit}"
        size //= 1024
    return f"{size} GiB"
