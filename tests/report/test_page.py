"""Does the page about an inspection stand alone, and say what was found and why not?"""

from __future__ import annotations

import importlib.util
import re
from html.parser import HTMLParser

import pytest

import qpass
from qpass.report import Table
from qpass.report.page import inspection_page
from qpass.report.table import alike, collapsed
from tests.zoo import ZOO, Specimen, specimen

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """The text of a page whose tags are closed in order; what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [f"{name}={value}" for name, value in attrs if name in {"src", "href"}]
        assert tag not in {"script", "link", "iframe", "object"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_every_weight_and_every_reason_is_on_the_page(entry: Specimen) -> None:
    found = qpass.inspect(
        entry.build(0).float(),
        {k: v if not v.is_floating_point() else v.float() for k, v in entry.inputs().items()},
    )
    page = inspection_page("a <b> & c", found)
    read = Reader(page)
    assert read.fetched == []
    assert "url(" not in page
    assert "@import" not in page
    assert "a <b> & c" in read.text
    assert f"{sum(r.free for r in found.regions)} of {len(found.regions)}" in read.text
    for row in (*found.summary()[1].rows, *found.summary()[2].rows):
        assert all(str(cell) in read.text for cell in row)
    for region in found.regions:
        assert region.group.value in read.text
        assert region.free or region.pins[0].why in read.text
        assert all(bound.pins[0].why in read.text for bound in region.bounds if region.free)
    assert inspection_page("a <b> & c", found) == page


def test_without_jinja_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = qpass.inspect(specimen("nano_gpt").build(0), dict(specimen("nano_gpt").inputs()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(qpass.QpassError, match=r"qpass\[report\]"):
        inspection_page("model", found)


def test_rows_that_differ_in_layers_are_one() -> None:
    rows = (
        ("layers.0.q[0:8]", 8, "with layers.0.v"),
        ("layers.1.q[0:8]", 8, "with layers.1.v"),
        ("layers.2.q[0:8]", 16, "with layers.2.v"),
        ("layers.10.q[0:8]", 8, "with layers.10.v"),
        ("head", 8, "with layers.0.v"),
    )
    table = Table("t", ("weight", "size", "why"), rows)
    assert alike(table, ("weight", "why")) == [[0, 1, 3], [2], [4]]
    assert collapsed(table, ("weight", "why")).rows == (
        ("layers.*.q[0:8]", 8, "with layers.*.v", 3),
        ("layers.2.q[0:8]", 16, "with layers.2.v", 1),
        ("head", 8, "with layers.0.v", 1),
    )
    assert collapsed(Table("t", ("a",), ()), ("a",)).rows == ()
