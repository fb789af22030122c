"""Whether it is still the same function, and if not, how far it is."""

from qpass.verify.quality import evaluate, evaluate_many, score_batches, windows
from qpass.verify.scores import Budget, Estimate, Evaluation, Score, SiteCost, SiteError, summarize

__all__ = [
    "Budget",
    "Estimate",
    "Evaluation",
    "Score",
    "SiteCost",
    "SiteError",
    "evaluate",
    "evaluate_many",
    "score_batches",
    "summarize",
    "windows",
]
