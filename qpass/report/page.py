"""How an inspection becomes one page of HTML that needs nothing else."""

from __future__ import annotations

import collections
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import final

from qpass.errors import Unsupported
from qpass.report.inspection import REGION_NAMES, Inspection, Limit
from qpass.report.table import Cell, Table, alike, collapsed

TEMPLATE = Path(__file__).with_name("inspection.html")
# how the input of a product is rotated, in the order of what it costs
HOW = ("folded", "online", "declined")


@final
@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a bar: how many of all, and its share in percent."""

    name: str
    count: int
    share: float


@final
@dataclass(frozen=True, slots=True)
class _Card:
    """Regions that are alike: the row of the summary, and what one of them holds."""

    row: dict[str, Cell]
    free: bool
    first: str
    absorbers: list[dict[str, Cell]]
    reasons: tuple[str, ...]
    limits: tuple[Limit, ...]


def check() -> None:
    """Raise Unsupported without the package that fills pages."""
    if importlib.util.find_spec("jinja2") is None:
        raise Unsupported("an HTML report needs jinja2; pip install 'qpass[report]'")


def inspection_page(name: str, found: Inspection) -> str:
    """A page about the model `name`: what rotates with which weights, what does not, and why."""
    check()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    regions, products, declined = found.summary()
    counts = collections.Counter(product.input for product in found.products)
    total = max(1, len(found.products))
    parts = [_Part(how, counts[how], 100 * counts[how] / total) for how in HOW]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        free=sum(region.free for region in found.regions),
        regions=len(found.regions),
        weights=len({a.weight for some in found.absorbers for a in some}),
        products=len(found.products),
        parts=parts,
        cards=_cards(found, regions),
        product_rows=products.records(),
        declined_rows=declined.records(),
    )


def _cards(found: Inspection, rows: Table) -> list[_Card]:
    """A card for each row of the summary, about the first of the regions that it stands for."""
    cards: list[_Card] = []
    groups = alike(found.regions_table(), REGION_NAMES)
    for row, places in zip(rows.records(), groups, strict=True):
        region = found.regions[places[0]]
        reasons = tuple(dict.fromkeys(f"{pin.why} ({pin.where})" for pin in region.pins))
        weights = tuple((a.weight, a.role, a.axis) for a in found.absorbers[places[0]])
        absorbers = collapsed(Table("", ("weight", "role", "axis"), weights), ("weight",))
        limits = found.limits[places[0]] if region.free else ()
        cards.append(_Card(row, region.free, region.name, absorbers.records(), reasons, limits))
    return cards
