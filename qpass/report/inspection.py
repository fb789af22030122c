"""What was found in a model: its regions, its matrix products, and why some stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from qpass.analyze import (
    Convolution,
    Matmul,
    Pin,
    Region,
    find_convolutions,
    find_inputs,
    find_matmuls,
)
from qpass.analyze.regions import name_of, use_names
from qpass.ir import Note, Program, read
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
REGION_NAMES = ("first weight", "why not larger")


@final
@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product, or convolution: its weight, and how its input can be rotated."""

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
class Limit:
    """Why a region is free under no larger group: each reason, with its operator and module."""

    group: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"not {self.group}: {self.reasons[0]}"


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """The regions and products of a model, and notes on what could not be understood.

    A region stands under the largest group that admits it; axes that are free under several groups,
    none larger than the other, are in a region of each. `absorbers` are the weights of each region
    and `limits` say why its group is not larger, both in the order of the regions. `coverage` and
    `online` say what rotating all that can rotate reaches, and which transforms it costs for each
    token.
    """

    regions: tuple[Region, ...]
    absorbers: tuple[tuple[Absorber, ...], ...]
    limits: tuple[tuple[Limit, ...], ...]
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
                "; ".join(map(str, limits)) if r.free and limits else None,
            )
            for r, limits in zip(self.regions, self.limits, strict=True)
        ]
        first, last = REGION_NAMES
        return Table("regions", (first, "group", "size", "weights", "state", last), tuple(rows))

    def costs(self) -> tuple[Table, ...]:
        """How much of the weights reads rotated inputs, what that costs a token, and where."""
        rows = tuple((p.region, len(p.turned), p.why) for p in self.paired)
        pairs = Table("turned in part", ("region", "weights", "why"), rows)
        return (coverage_table(self.coverage, self.online), *((pairs,) if rows else ()))

    def __str__(self) -> str:
        return "\n".join(table.text() for table in (*self.summary(), *self.costs()))


def inspection(
    program: Program,
    largest: tuple[Region, ...],
    regions: tuple[Region, ...],
    plan: Plan,
    rewritten: Program,
    notes: tuple[Note, ...],
) -> Inspection:
    """Describe a program with its norms folded, and the plan that rotates all it can.

    `largest` are its regions under the largest groups, `regions` those that can rotate;
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
    for product in (*find_matmuls(program), *find_convolutions(program)):
        name = program.site(product.use)
        if (region := readers.get((product.use, product.reads))) is not None:
            how = "online" if reads_turned(rewritten, product.use) else "folded"
            why = f"with {region}"
        elif name in online:
            how, why = "online", online[name]
        else:
            how, why = "declined", declined.get(name, "it is one wide")
        products.append(Product(name, *_size(program, product), how, why))
    listed = {product.site for product in products}
    for use, (meeting, *_) in find_inputs(program).items():
        # products of weights that no layer holds alone, as experts
        name, shape = program.site(use), read.static_shape(program.node(use))
        if name in online and name not in listed and shape is not None:
            columns = shape[meeting.reads]
            rows = math.prod(shape) // columns
            products.append(Product(name, rows, columns, "online", online[name]))
            listed.add(name)
    absorbers = tuple(
        tuple(Absorber(program.site(s.use), s.axis, s.role.value) for s in region.sites)
        for region in largest
    )
    limits = tuple(
        tuple(Limit(b.group.value, _reasons(program, b.pins)) for b in region.bounds)
        for region in largest
    )
    listed = {product.site for product in products} | {region.name for region in regions}
    others = tuple(Note(False, d.where, d.why) for d in plan.declined if d.where not in listed)
    coverage, widths = find_coverage(rewritten), online_widths(rewritten)
    said = (*notes, *others)
    return Inspection(
        largest, absorbers, limits, tuple(products), said, coverage, widths, plan.paired
    )


def _size(program: Program, product: Matmul | Convolution) -> tuple[int, int]:
    """How many values a product makes of how many, at each place of a kernel."""
    shape = [int(size) for size in read.shape(program.node(product.use))]
    if isinstance(product, Matmul):
        return shape[product.writes], shape[product.reads]
    made = shape[1] * product.groups if product.reads == 0 else shape[0]
    return made, product.width


def _reasons(program: Program, pins: tuple[Pin, ...]) -> tuple[str, ...]:
    """What pins say, each reason once, with the first operator and module that it holds at."""
    places = {pin.why: pin.where for pin in reversed(pins)}
    return tuple(
        f"{why} ({_place(program, places[why])})" for why in dict.fromkeys(p.why for p in pins)
    )


def _place(program: Program, value: str) -> str:
    """The operator that makes a value and the module it stands in, as far as there are any."""
    node = program.node(value)
    if node.op != "call_function":
        return value
    path = read.module_path(node)
    return f"{read.target_name(node)} in {path}" if path else read.target_name(node)
