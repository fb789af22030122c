"""How good is each model, and which of its sites lose most?"""

from __future__ import annotations

from collections.abc import Mapping

from qpass.report.table import Cell, Table
from qpass.verify import Budget, Estimate, Evaluation, SiteCost

QUALITY = ("weights MB", "perplexity", "KL to reference", "same top-1")


def quality_table(title: str, evaluations: Mapping[str, Evaluation]) -> Table:
    """One row for each model; what the numbers rest on is in the title."""
    bases = {(e.windows, e.positions) for e in evaluations.values()}
    counts = " or ".join(f"{windows} windows, {n} positions" for windows, n in sorted(bases))
    rows = [
        (name, found.megabytes, *quality_cells(found), found.broken or None)
        for name, found in evaluations.items()
    ]
    return Table(f"{title} ({counts})", ("model", *QUALITY, "broken positions"), tuple(rows))


def quality_cells(found: Evaluation) -> tuple[Cell, Cell, Cell]:
    """Perplexity, KL divergence and agreement, each with its standard error."""
    return (
        estimate_text(found.perplexity),
        estimate_text(found.kl),
        estimate_text(found.agreement),
    )


def estimate_text(estimate: Estimate | None) -> str | None:
    """A value to four digits, and its standard error to two."""
    if estimate is None:
        return None
    value = f"{estimate.value:.4g}"
    return value if estimate.error is None else f"{value} ± {estimate.error:.2g}"


def sites_table(found: Evaluation) -> Table:
    """The sites of one model, those that lose most first, those without a number last."""
    measured = [site for site in found.sites if site.error is not None]
    rest = [site for site in found.sites if site.error is None]
    ordered = [*sorted(measured, key=lambda site: -(site.error or 0.0)), *rest]
    rows = tuple((site.path or "the model", site.error, site.why or None) for site in ordered)
    return Table("relative error of each site's output", ("site", "error", "why none"), rows)


def budget_table(budget: Budget) -> Table:
    """What each site costs, the dearest first, and all of them together."""

    def cost(site: SiteCost) -> float:
        return site.measured.value if site.measured is not None else site.predicted or 0.0

    rows: list[tuple[Cell, ...]] = [
        (site.site, site.error, site.predicted, estimate_text(site.measured))
        for site in sorted(budget.sites, key=cost, reverse=True)
    ]
    rows.append(("the sum", None, budget.predicted, estimate_text(budget.measured)))
    rows.append(("all at once", None, None, estimate_text(budget.whole)))
    columns = ("site", "relative squared error", "predicted KL", "measured KL")
    return Table("what each site's quantization costs by itself", columns, tuple(rows))
