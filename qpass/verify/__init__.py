"""Whether it is still the same function, and if not, how far it is."""

from qpass.verify.quality import evaluate, evaluate_many, score_batches, windows
from qpass.verify.scores import Estimate, Evaluation, Score, SiteError, summarize

__all__ = [
    "Estimate",
    "Evaluation",
    "Score",
    "SiteError",
    "evaluate",
    "evaluate_many",
    "score_batches",
    "summarize",
    "windows",
]
