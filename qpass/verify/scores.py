"""How good a model is, given what was counted in each window of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from qpass.errors import BadInput


@final
@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the positions of one window, in nats.

    `tokens` counts next tokens whose probability entered `loss` (of the model) and
    `reference_loss`; `positions` counts compared distributions. `broken` positions, where the
    model gave no distribution at all, are among them with an infinite loss and divergence.
    """

    tokens: int
    loss: float
    reference_loss: float
    positions: int
    divergence: float
    agreements: int
    broken: int


@final
@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and its standard error over windows (None for one window or an infinite mean)."""

    value: float
    error: float | None


@final
@dataclass(frozen=True, slots=True)
class SiteError:
    """How far one module's output is from the reference's, relative to its norm.

    The error includes what earlier modules did to the input. None where the outputs cannot be
    compared, with the reason.
    """

    path: str
    error: float | None
    why: str = ""


@final
@dataclass(frozen=True, slots=True)
class SiteCost:
    """What quantizing one site costs a model that is float otherwise, in nats a position.

    `error` is the squared error of what the site makes over its square, on the float model's
    values. `predicted` is linear in it (None where no gradient of the outputs reaches the site),
    `measured` is the KL divergence from the float model (None if not asked for).
    """

    site: str
    error: float
    predicted: float | None
    measured: Estimate | None


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """Whose quantization costs what, in the order of the graph, and all of it together.

    `whole` is measured with everything quantized, `measured` the sum over sites of what each costs
    alone; both on the same windows.
    """

    sites: tuple[SiteCost, ...]
    whole: Estimate
    measured: Estimate | None

    @property
    def predicted(self) -> float:
        """The sum over sites."""
        return math.fsum(site.predicted or 0.0 for site in self.sites)


@final
@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model measured against a reference on the same windows.

    `kl` is KL(reference || model) in nats a position, `agreement` the share of positions with
    the same most likely token, `perplexity_ratio` the model's over the reference's with the error
    of the paired difference. Perplexities are None for models that predict no next token.
    Megabytes are 10^6 bytes of state. `budget` is there if it was asked for.
    """

    windows: int
    tokens: int
    positions: int
    broken: int
    perplexity: Estimate | None
    reference_perplexity: Estimate | None
    perplexity_ratio: Estimate | None
    kl: Estimate
    agreement: Estimate
    megabytes: float
    reference_megabytes: float
    sites: tuple[SiteError, ...] = ()
    budget: Budget | None = None


def summarize(
    scores: Sequence[Score],
    megabytes: float,
    reference_megabytes: float,
    sites: tuple[SiteError, ...] = (),
) -> Evaluation:
    """Means and standard errors of `scores`, one for each window."""
    if not any(score.positions for score in scores):
        raise BadInput("nothing to evaluate: no batch holds a position that is not padding")
    tokens = [score.tokens for score in scores]
    positions = [score.positions for score in scores]
    loss = [score.loss for score in scores]
    reference = [score.reference_loss for score in scores]
    excess = [one - other for one, other in zip(loss, reference, strict=True)]
    return Evaluation(
        windows=len(scores),
        tokens=sum(tokens),
        positions=sum(positions),
        broken=sum(score.broken for score in scores),
        perplexity=_exponential(mean(loss, tokens)),
        reference_perplexity=_exponential(mean(reference, tokens)),
        perplexity_ratio=_exponential(mean(excess, tokens)),
        kl=_required(mean([score.divergence for score in scores], positions)),
        agreement=_required(mean([float(score.agreements) for score in scores], positions)),
        megabytes=megabytes,
        reference_megabytes=reference_megabytes,
        sites=sites,
    )


def mean(sums: Sequence[float], counts: Sequence[int]) -> Estimate | None:
    """The mean of what `sums` adds up, `counts` terms in each; None where there are no terms.

    The windows are the sample: the error is that of a ratio of two sums, to first order.
    """
    total = sum(counts)
    if total == 0:
        return None
    value = math.fsum(sums) / total
    used = [(part, count) for part, count in zip(sums, counts, strict=True) if count]
    if len(used) == 1 or not math.isfinite(value):
        return Estimate(value, None)
    squares = math.fsum((part - value * count) ** 2 for part, count in used)
    return Estimate(value, math.sqrt(squares * len(used) / (len(used) - 1)) / total)


def _exponential(estimate: Estimate | None) -> Estimate | None:
    if estimate is None:
        return None
    try:
        value = math.exp(estimate.value)
    except OverflowError:
        return Estimate(math.inf, None)
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def _required(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise BadInput("there is no position to compare")
    return estimate
