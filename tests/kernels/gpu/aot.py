"""`make gpu-aot`: every GPU kernel compiled for every target, and what has to hold of the code.

The table in `aot.md` is what the pinned compiler makes; `--update` writes it anew.
"""

from __future__ import annotations

import argparse
import difflib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qpass.runtime.gpu import KERNELS, Build
from qpass.runtime.target import TARGETS, Target, target
from tests.kernels.gpu.compiled import Compiled, compile_build, predicted

TABLE = Path(__file__).with_name("aot.md")
HEAD = """# What the GPU kernels are compiled to

Written by `make gpu-aot ARGS=--update` with the compiler of `constraints.txt`, on no GPU. The last
column is the part of the roofline that a model of occupancy predicts for a launch; it is not timed.

| kernel | build | target | registers | shared | products | predicted |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table, and what is wrong with it."""

    text: str
    wrong: str | None


def guard(build: Build, found: Compiled, on: Target) -> str | None:
    """What has to hold of compiled code and does not, or None."""
    if found.spills:
        return f"{found.spills} accesses to spilled registers"
    if found.shared > on.shared:
        return f"{found.shared} bytes of shared memory, {on.name} has {on.shared}"
    if build.mma is not None and on.has(build.mma) and found.mma(build.mma) is None:
        return f"no {build.mma} products on {on.name}, which has them"
    return None


def line(what: tuple[str, str, int]) -> Line:
    """Compile one build of a kernel for a target."""
    name, on, index = what
    there = target(on)
    builds = KERNELS[name].builds(there)
    if isinstance(builds, str):
        return Line(f"| {name} | | {on} | | | | declined: {builds} |", None)
    build = builds[index]
    found = compile_build(build, there)
    part = predicted(build, found, there)
    products = "" if build.mma is None else found.mma(build.mma) or "none"
    cells = (
        name, build.label, on, found.registers, found.shared, products,
        "" if part is None else f"{part:.0%}",
    )  # fmt: skip
    wrong = guard(build, found, there)
    where = f"{name}, {build.label}, {on}"
    return Line(
        "| " + " | ".join(map(str, cells)) + " |", None if wrong is None else f"{where}: {wrong}"
    )


def merged(before: str, lines: list[str], made: set[tuple[str, str]]) -> str:
    """The table with the lines of these kernels and targets in place of those it had.

    Lines of kernels and targets that are no more go too.
    """
    known = [kernel.name for kernel in sorted(KERNELS, key=lambda kernel: kernel.name)]
    targets = [there.name for there in TARGETS]

    def cells(text: str) -> tuple[str, str]:
        parts = [part.strip() for part in text.split("|")]
        return parts[1], parts[3]

    kept = [text for text in before.splitlines() if text.startswith("| ")][2:]
    kept = [t for t in kept if cells(t) not in made and cells(t)[0] in known]
    # a stable sort: builds stay in their order
    ordered = sorted(
        [*kept, *lines], key=lambda t: (known.index(cells(t)[0]), targets.index(cells(t)[1]))
    )
    return HEAD + "".join(f"{text}\n" for text in ordered)


def everything(only: str) -> Iterator[tuple[str, str, int]]:
    """Kernel, target and number of every build, in the order of the table."""
    for kernel in sorted(KERNELS, key=lambda kernel: kernel.name):
        for on in TARGETS:
            builds = kernel.builds(on)
            count = 1 if isinstance(builds, str) else len(builds)
            if only in f"{kernel.name} {on.name}":
                yield from ((kernel.name, on.name, i) for i in range(count))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--only", default="", help="kernels or targets with this in their names")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    work = list(everything(options.only))
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        lines: list[Line] = []
        for found in pool.imap(line, work):
            lines.append(found)
            sys.stdout.write(found.text + "\n")
            sys.stdout.flush()
    wrong = [found.wrong for found in lines if found.wrong is not None]
    for problem in wrong:
        sys.stdout.write(f"WRONG {problem}\n")
    before = TABLE.read_text(encoding="utf-8") if TABLE.exists() else HEAD
    text = merged(before, [found.text for found in lines], {(name, on) for name, on, _ in work})
    if options.update and not wrong:
        TABLE.write_text(text, encoding="utf-8")
    elif text != before:
        changes = difflib.unified_diff(before.splitlines(), text.splitlines(), n=0, lineterm="")
        sys.stdout.writelines(f"{change}\n" for change in changes)
        wrong.append("the table has changed")
    sys.stdout.write(f"{len(lines)} builds, {len(wrong)} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
