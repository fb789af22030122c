"""In which order products are rounded: those of one value together, as the program meets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from qpass.analyze import Matmul, find_matmuls
from qpass.ir import Program
from qpass.plan import Plan, Quantized, Role


@final
@dataclass(frozen=True, slots=True)
class Stage:
    """A value, and the quantized products that read it.

    Products of one site are rounded once: `again` are those whose site an earlier stage rounds.
    """

    value: str
    products: tuple[Matmul, ...]
    again: tuple[Matmul, ...] = ()


def entries_of(program: Program, plan: Plan) -> dict[str, Quantized]:
    """The plan's choice for each use of a weight that a product reads."""
    sites = {q.site: q for q in plan.quantized if q.role is not Role.EMBEDDING}
    uses = [(m.use, program.site(m.use)) for m in find_matmuls(program)]
    return {use: sites[site] for use, site in uses if site in sites}


def find_stages(program: Program, entries: Mapping[str, Quantized]) -> tuple[Stage, ...]:
    """The stages of a program, in the order in which their values are made."""
    by_value: dict[str, list[Matmul]] = {}
    for matmul in find_matmuls(program):
        if matmul.use in entries:
            by_value.setdefault(matmul.value, []).append(matmul)
    order = {node.name: at for at, node in enumerate(program.graph.nodes)}
    seen: set[str] = set()
    stages: list[Stage] = []
    for value in sorted(by_value, key=order.__getitem__):
        first: list[Matmul] = []
        again: list[Matmul] = []
        for matmul in by_value[value]:
            site = entries[matmul.use].site
            (again if site in seen else first).append(matmul)
            seen.add(site)
        stages.append(Stage(value, tuple(first), tuple(again)))
    return tuple(stages)
