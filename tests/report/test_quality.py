"""Do the tables of quality show every number, and its absence?"""

from __future__ import annotations

import json
import math

from qpass.report.quality import estimate_text, quality_table, sites_table
from qpass.report.values import json_text
from qpass.verify import Estimate, Evaluation, Score, SiteError, summarize


def evaluation(broken: int = 0) -> Evaluation:
    scores = [
        Score(
            tokens=9,
            loss=math.inf if broken else 20.0 + at,
            reference_loss=19.0,
            positions=10,
            divergence=0.5,
            agreements=8 + at,
            broken=broken,
        )
        for at in range(2)
    ]
    sites = (
        SiteError("low", 0.01),
        SiteError("none", None, "was not called as a module"),
        SiteError("high", 0.5),
    )
    return summarize(scores, 12.5, 50.0, sites)


def test_one_row_for_each_model() -> None:
    table = quality_table("text", {"a": evaluation(), "b": evaluation(broken=1)})
    assert table.title == "text (2 windows, 20 positions)"
    assert [row[0] for row in table.rows] == ["a", "b"]
    assert table.records()[0] == {
        "model": "a",
        "weights MB": 12.5,
        # exp(41 / 18), and half a nat in two windows of nine tokens
        "perplexity": "9.755 ± 0.54",
        "KL to reference": "0.05 ± 0",
        "same top-1": "0.85 ± 0.05",
        "broken positions": None,
    }
    assert table.records()[1]["perplexity"] == "inf"
    assert table.records()[1]["broken positions"] == 2


def test_an_absent_estimate_is_no_text() -> None:
    assert estimate_text(None) is None
    assert estimate_text(Estimate(0.123456, None)) == "0.1235"


def test_sites_are_ordered_by_what_they_lose() -> None:
    assert sites_table(evaluation()).rows == (
        ("high", 0.5, None),
        ("low", 0.01, None),
        ("none", None, "was not called as a module"),
    )


def test_an_evaluation_is_json() -> None:
    found = json.loads(json_text(evaluation(broken=1)))
    assert found["perplexity"] == {"value": None, "error": None}
    assert found["sites"][0] == {"path": "low", "error": 0.01, "why": ""}
