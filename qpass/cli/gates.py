"""Is a quantized model good enough to ship?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, final

import typer

from qpass.errors import BadInput

if TYPE_CHECKING:
    from qpass.verify import Evaluation

# exit code
FAILED = 1
# what can be limited -> what the limit means
METRICS = {
    "kl": "at most this many nats from the reference",
    "perplexity": "at most this many times the reference's perplexity",
    "agreement": "at least this share of equal top tokens",
}

Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="METRIC=LIMIT",
        help="Fail with exit code 1 outside a limit: "
        + "; ".join(f"{name}: {meaning}" for name, meaning in METRICS.items())
        + ".",
    ),
]


@final
@dataclass(frozen=True, slots=True)
class Gate:
    """One limit on one metric."""

    metric: str
    limit: float


def parse(given: Sequence[str]) -> tuple[Gate, ...]:
    """The gates of a command line."""
    from qpass.registry import unknown

    found: list[Gate] = []
    for text in given:
        metric, _, limit = text.partition("=")
        if metric not in METRICS:
            raise unknown("gate", metric, METRICS)
        try:
            number = float(limit)
        except ValueError as error:
            raise BadInput(f"--gate {text}: expected {metric}=NUMBER") from error
        if not math.isfinite(number):
            raise BadInput(f"--gate {text}: the limit is not finite")
        found.append(Gate(metric, number))
    return tuple(found)


def failures(gates: Sequence[Gate], found: Evaluation) -> list[str]:
    """Why each gate that `found` does not pass is failed; a missing number fails."""
    return [why for gate in gates if (why := _failure(gate, found)) is not None]


def _failure(gate: Gate, found: Evaluation) -> str | None:
    if gate.metric == "agreement":
        value = found.agreement.value
        return None if value >= gate.limit else f"agreement {value:.4g} is below {gate.limit:g}"
    estimate = found.kl if gate.metric == "kl" else found.perplexity_ratio
    if estimate is None:
        return f"{gate.metric} cannot be measured on this model"
    # written so that NaN fails
    if estimate.value <= gate.limit:
        return None
    return f"{gate.metric} {estimate.value:.4g} is above {gate.limit:g}"
