"""How close does each kernel come to what the machine can do, shape by shape and set by set?

What is measured is kept, so that a run that was stopped goes on; the table is written into the
README of the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import qpass.ops as ops
from qpass.rotations import Transform
from qpass.runtime import native, roofline
from qpass.runtime.native import Isa
from qpass.runtime.roofline import Limits
from tests.bench import kernels
from tests.results import ROOT, Results

STORE = ROOT / ".data" / "kernels.jsonl"
README = ROOT / "kernels" / "cpu" / "README.md"
BEGIN, END = "<!-- kernels -->\n", "<!-- /kernels -->\n"
# (out_features, in_features): the layers of a small model, of a large one, and a small one's head
LAYERS = ((576, 576), (1536, 576), (576, 1536), (8192, 2048), (2048, 8192), (49152, 576))
# name -> bits, columns of a group, offsets, integer activations: the presets of that name
PRODUCTS = {
    "w4a8": (4, 32, True, True),
    "w8a8": (8, None, False, True),
    "w4a16-g64": (4, 64, False, False),
}
ROTATE = "rotate, int8"
ROWS = (1, 4, 8, 32, 512)
SECONDS = 0.04
# slower calls are not worth waiting for
SLOWEST = 1.5


@dataclass(frozen=True)
class Cell:
    """One kernel, forced by its instruction set, on one shape."""

    isa: str
    product: str
    outputs: int  # 0 for a rotation, which has none
    inputs: int
    rows: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.isa}, {self.line}, {self.rows} rows, {self.threads} threads"

    @property
    def limits(self) -> str:
        """The entry with what the set can do on these threads."""
        return _limits_name(self.isa, self.threads)

    @property
    def line(self) -> str:
        """What a line of the table is about."""
        return f"{self.product}, {self.inputs}{f' -> {self.outputs}' if self.outputs else ''}"

    @property
    def bytes(self) -> int:
        """What a call must read, weights or rows, and of rows what it writes."""
        n, k = self.outputs, self.inputs
        if not n:
            return self.rows * k * (4 + 1)
        bits, width, offsets, _ = PRODUCTS[self.product]
        groups = 0 if width is None else n * k // width
        return n * k * bits // 8 + 4 * n + 2 * groups * (1 + offsets)

    @property
    def copies(self) -> int:
        """How many weights take turns."""
        few = self.outputs and self.rows <= kernels.FEW_ROWS
        return max(1, kernels.COLD_BYTES // self.bytes) if few else 1

    def fraction(self, seconds: float, limits: Limits) -> float:
        """The part of the limit that a call of so many seconds reaches."""
        reading = self.bytes / limits.bandwidth(self.bytes * self.copies) / 1e9
        integer = not self.outputs or PRODUCTS[self.product][3]
        peak = limits.integer if integer else limits.float32
        assert peak is not None
        operations = 2 * self.rows * self.outputs * self.inputs
        return max(reading, operations / peak / 1e12) / seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench ARGS=--table", description=__doc__)
    parser.add_argument("--table", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stale", action="store_true", help="results of other code count too")
    parser.add_argument("--print", action="store_true", help="measure nothing, write nothing")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    given = parser.parse_args(arguments)
    sources = [*(ROOT / "kernels" / "cpu").glob("*.[ch]pp"), ROOT / "tests" / "bench" / "table.py"]
    store = Results(STORE, *sorted(sources))
    known = store.read(stale=given.stale)
    cells = list(_cells(sorted(set(given.threads))))
    if not given.print:
        _measure([cell for cell in cells if cell.name not in known], store, known)
    text = table(cells, known)
    print(text)  # noqa: T201
    if not given.print:
        README.write_text(replaced(README.read_text(encoding="utf-8"), text), encoding="utf-8")


def replaced(readme: str, text: str) -> str:
    """`readme` with `text` between its marks."""
    found, count = re.subn(
        f"(?<={BEGIN}).*?(?={END})", lambda _: text, readme, count=1, flags=re.DOTALL
    )
    if not count:
        raise ValueError(f"there are no marks {BEGIN.strip()} and {END.strip()}")
    return found


Known = Mapping[str, Mapping[str, Any]]


def table(cells: list[Cell], known: Known) -> str:
    """What is known, as Markdown: the newest set first, microseconds and parts of the limit."""
    limits = {name: Limits(**found) for name, found in known.items() if "reads" in found}
    threads = sorted({cell.threads for cell in cells})
    head = ["set", "product", *(f"{rows} row{'s' * (rows > 1)}" for rows in ROWS)]
    lines = [head, ["---"] * len(head)]
    for isa in dict.fromkeys(cell.isa for cell in cells):
        for line in dict.fromkeys(cell.line for cell in cells):
            here = [c for c in cells if (c.isa, c.line) == (isa, line)]
            by_rows = [[c for c in here if c.rows == rows] for rows in ROWS]
            lines.append([isa, line, *(_text(several, known, limits) for several in by_rows)])
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    what = " / ".join(f"{n} thread{'s' * (n > 1)}" for n in threads)
    text = f"Microseconds on {what}, and in brackets the part of the limit reached.\n\n{body}"
    return text + "\n" + _limits_table({c.isa: None for c in cells}, threads, limits)


def _text(several: list[Cell], known: Known, limits: Mapping[str, Limits]) -> str:
    pairs = [(c, known[c.name]["us"]) for c in several if c.name in known]
    if not pairs or len(pairs) < len(several) or any(c.limits not in limits for c in several):
        return "-"
    times = " / ".join(_rounded(us) for _, us in pairs)
    parts = (c.fraction(us / 1e6, limits[c.limits]) for c, us in pairs)
    return f"{times} ({' / '.join(format(part, '.0%') for part in parts)})"


def _rounded(number: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _limits_table(sets: Iterable[str], threads: list[int], limits: Mapping[str, Limits]) -> str:
    """What the parts are parts of."""
    lines = [["limits of a set", *(f"{n} thread{'s' * (n > 1)}" for n in threads)]]
    lines.append(["---"] * len(lines[0]))
    for isa in sets:
        found = [limits.get(_limits_name(isa, n)) for n in threads]
        lines.append([isa, *("-" if at is None else _one(at) for at in found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _one(at: Limits) -> str:
    reads = ", ".join(f"{rate:.3g} of {size >> 10} KiB" for size, rate in at.reads)
    return f"int8 {at.integer:.3g} Tops/s, float32 {at.float32:.3g}; reads GB/s: {reads}"


def _limits_name(isa: str, threads: int) -> str:
    return f"limits of {isa}, {threads} threads"


def _cells(threads: list[int]) -> Iterator[Cell]:
    """Every cell, those that share a weight next to each other."""
    for isa in _sets():
        for product in (*PRODUCTS, ROTATE):
            rotating = product == ROTATE
            shapes = [(0, k) for k in sorted({k for _, k in LAYERS})] if rotating else LAYERS
            for n, k in shapes:
                for rows in ROWS:
                    for count in threads:
                        yield Cell(isa.name.lower(), product, n, k, rows, count)


def _sets() -> list[Isa]:
    found = native.load()
    if found.newest is None:
        raise SystemExit(f"there is nothing to measure: {found.why}")
    real = (isa for isa in found.built if isa is not Isa.AMX_EMULATED and isa <= found.newest)
    return sorted(real, reverse=True)


def _measure(cells: list[Cell], store: Results, known: dict[str, dict[str, object]]) -> None:
    for name, found in _limits({cell.threads for cell in cells}).items():
        known[name] = dataclasses.asdict(found)
        store.add(name, known[name])
    generator = torch.Generator().manual_seed(0)
    packed: dict[tuple[str, int, int], ops.PackedLinear] = {}
    for cell in cells:
        torch.set_num_threads(cell.threads)
        key = (cell.product, cell.outputs, cell.inputs)
        if cell.outputs and key not in packed:
            # one weight at a time
            bits, width, offsets, _ = PRODUCTS[cell.product]
            shape = (cell.outputs, cell.inputs)
            packed = {key: kernels.packed_layer(*shape, bits, width, offsets, generator)}
        calls = _calls(cell, packed.get(key), generator)
        with native.capped(Isa[cell.isa.upper()]), torch.inference_mode():
            known[cell.name] = {"us": 1e6 * _median(calls)}
        store.add(cell.name, known[cell.name])


def _calls(
    cell: Cell, packed: ops.PackedLinear | None, generator: torch.Generator
) -> tuple[Callable[[], object], ...]:
    """Calls that take turns."""
    x = torch.randn(cell.rows, cell.inputs, generator=generator)
    if packed is None:
        fast = Transform("hadamard", cell.inputs).fast()
        assert fast is not None
        turn = (fast.signs.float(), fast.factor.float(), fast.power)
        return (lambda: ops.quantize_rows(x, 8, *turn),)
    several = kernels.copies(packed, cell.rows)
    if PRODUCTS[cell.product][3]:
        codes, scales = ops.quantize_rows(x, 8)
        return tuple(
            lambda p=p: ops.linear_codes(codes, scales, p, None, torch.float32) for p in several
        )
    return tuple(lambda p=p: ops.linear_real(x, p, None) for p in several)


def _median(calls: tuple[Callable[[], object], ...]) -> float:
    """Seconds for a call; the calls take turns, so that their weights do."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    turn = -1
    while turn < 3 or time.perf_counter() < end:
        turn += 1
        begin = time.perf_counter()
        calls[turn % len(calls)]()
        times.append(time.perf_counter() - begin)
        if times[-1] > SLOWEST:
            break
    # the first call pays for memory and for waking threads
    return statistics.median(times[1:] or times)


def _limits(wanted: set[int]) -> dict[str, Limits]:
    """What each set can do, on each of the `wanted` numbers of threads."""
    found: dict[str, Limits] = {}
    if not wanted:
        return found
    torch.set_num_threads(max(wanted))
    for isa in _sets():
        with native.capped(isa):
            for at in roofline.measure(seconds=SECONDS).limits:
                found[_limits_name(isa.name.lower(), at.threads)] = at
    return found


if __name__ == "__main__":
    main()
