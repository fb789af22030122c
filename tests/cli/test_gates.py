"""Do gates pass what is good enough and nothing else?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qpass.cli.gates import METRICS, failures, parse
from qpass.errors import BadInput, UnknownName
from qpass.verify import Estimate, Evaluation

FOUND = Evaluation(
    windows=4,
    tokens=100,
    positions=100,
    broken=0,
    perplexity=Estimate(22.0, 1.0),
    reference_perplexity=Estimate(20.0, 1.0),
    perplexity_ratio=Estimate(1.1, 0.01),
    kl=Estimate(0.05, 0.001),
    agreement=Estimate(0.9, 0.01),
    megabytes=1.0,
    reference_megabytes=2.0,
)


@pytest.mark.parametrize(
    ("gate", "passes"),
    [
        ("kl=0.05", True),
        ("kl=0.049", False),
        ("perplexity=1.2", True),
        ("perplexity=1.0", False),
        ("agreement=0.9", True),
        ("agreement=0.95", False),
    ],
)
def test_a_limit_holds_on_its_own_side(gate: str, passes: bool) -> None:
    failed = failures(parse([gate]), FOUND)
    assert (failed == []) == passes
    assert all(why.startswith(gate.partition("=")[0]) for why in failed)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_a_number_never_passes(metric: str) -> None:
    broken = Estimate(math.nan, None)
    found = replace(FOUND, kl=broken, perplexity_ratio=broken, agreement=broken)
    assert len(failures(parse([f"{metric}=0.5"]), found)) == 1


def test_a_missing_metric_fails_with_a_reason() -> None:
    (why,) = failures(parse(["perplexity=2"]), replace(FOUND, perplexity_ratio=None))
    assert "cannot be measured" in why


def test_every_gate_is_checked() -> None:
    assert len(failures(parse(["kl=0", "agreement=1", "perplexity=9"]), FOUND)) == 2


def test_gates_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'agreement'"):
        parse(["agrement=0.9"])
    for text in ("kl", "kl=", "kl=low"):
        with pytest.raises(BadInput, match="expected kl=NUMBER"):
            parse([text])
    for text in ("kl=nan", "kl=inf"):
        with pytest.raises(BadInput, match="not finite"):
            parse([text])
