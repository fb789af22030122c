"""What was found in a model: its regions, its matrix products, and why some stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.analyze import Region, find_matmuls
from qpass.analyze.regions import name_of, use_names
from qpass.ir import Note, Program
from qpass.plan import Paired, Plan
from qpass.report.coverage import (
    Coverage,
    coverage_table,
    find_coverage,
    online_widths,
    reads_turned,
)
from qpass.report.table import Table, collapsed

# the columns of a region that number layers
REGION_NAMES = ("first weight",)


@final
@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product: its weight, and how its input can be rotated."""

    site: str
    rows: int
    columns: int
    input: str
    why: str


@final
@dataclass(frozen=True, slots=True)
class Absorber:
    """One axis of a weight that changes basis with a region."""

    weight: str
    axis: int
    role: str


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """The regions and products of a model, and notes on what could not be understood.

    `absorbers` are the weights of each region, in the order of the regions. `coverage` and `online`
    say what rotating all that can rotate reaches, and which transforms it costs for each token.
    """

    regions: tuple[Region, ...]
    absorbers: tuple[tuple[Absorber, ...], ...]
    products: tuple[Product, ...]
    notes: tuple[Note, ...]
    coverage: Coverage
    online: tuple[int, ...]
    paired: tuple[Paired, ...]

    def tables(self) -> tuple[Table, Table, Table]:
        """Regions, products, and everything declined, each with its reason."""
        regions = self.regions_table()
        where = (None if r.free else r.pins[0].where for r in self.regions)
        products = [(p.site, f"{p.rows} x {p.columns}", p.input, p.why) for p in self.products]
        declined = [(n.where, n.why) for n in self.notes if not n.done]
        return (
            Table(
                regions.title,
                (*regions.columns, "at"),
                tuple((*row, at) for row, at in zip(regions.rows, where, strict=True)),
            ),
            Table("products", ("weight", "shape", "input", "why"), tuple(products)),
            Table("declined", ("where", "why"), tuple(declined)),
        )

    def summary(self) -> tuple[Table, Table, Table]:
        """The same, with layers that are alike in one row."""
        _, products, declined = self.tables()
        return (
            # without the graph's names for values, which differ from layer to layer
            collapsed(self.regions_table(), REGION_NAMES),
            collapsed(products, ("weight", "why")),
            collapsed(declined, ("where", "why")),
        )

    def regions_table(self) -> Table:
        """One row for each region."""
        rows = [
            (
                r.name,
                r.group.value,
                f"{r.heads} x {r.width}" if r.heads > 1 else r.width,
                len(r.sites),
                "free" if r.free else r.pins[0].why,
            )
            for r in self.regions
        ]
        return Table("regions", (*REGION_NAMES, "group", "size", "weights", "state"), tuple(rows))

    def costs(self) -> tuple[Table, ...]:
        """How much of the weights reads rotated inputs, what that costs a token, and where."""
        rows = tuple((p.region, len(p.turned), p.why) for p in self.paired)
        pairs = Table("turned in part", ("region", "weights", "why"), rows)
        return (coverage_table(self.coverage, self.online), *((pairs,) if rows else ()))

    def __str__(self) -> str:
        return "\n".join(table.text() for table in (*self.summary(), *self.costs()))


def inspection(
    program: Program,
    regions: tuple[Region, ...],
    plan: Plan,
    rewritten: Program,
    notes: tuple[Note, ...],
) -> Inspection:
    """Describe a program with its norms folded, and the plan that rotates all it can.

    `rewritten` is the program after that plan.
    """
    rotated = {r.region for r in plan.rotated}
    readers = {
        (site.use, site.axis): region.name
        for region in regions
        if region.name in rotated
        for site in region.sites
    }
    slices = {name: choice.region for choice in plan.paired for name in choice.turned}
    names = use_names(program) if slices else {}
    readers |= {
        (site.use, site.axis): slices[name]
        for region in regions
        for site in region.sites
        if (name := name_of(names.get(site.use, ""), site)) in slices
    }
    online = {o.site: o.transform.rotation for o in plan.online}
    declined = {d.where: d.why for d in plan.declined}
    products: list[Product] = []
    for matmul in find_matmuls(program):
        name = program.site(matmul.use)
        shape = program.node(matmul.use).meta["val"].shape
        if (region := readers.get((matmul.use, matmul.reads))) is not None:
            how = "online" if reads_turned(rewritten, matmul.use) else "folded"
            why = f"with {region}"
        elif name in online:
            how, why = "online", online[name]
        else:
            how, why = "declined", declined.get(name, "it is one wide")
        products.append(
            Product(name, int(shape[matmul.writes]), int(shape[matmul.reads]), how, why)
        )
    absorbers = tuple(
        tuple(Absorber(program.site(s.use), s.axis, s.role.value) for s in region.sites)
        for region in regions
    )
    listed = {product.site for product in products} | {region.name for region in regions}
    others = tuple(Note(False, d.where, d.why) for d in plan.declined if d.where not in listed)
    coverage, widths = find_coverage(rewritten), online_widths(rewritten)
    said = (*notes, *others)
    return Inspection(regions, absorbers, tuple(products), said, coverage, widths, plan.paired)
