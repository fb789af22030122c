"""How much worse a model predicts than its reference, and how much smaller it is."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qpass.errors import BadInput, expect_instance
from qpass.ir import Step
from qpass.verify.calls import Batch, logits, text
from qpass.verify.logits import Expected, compare
from qpass.verify.scores import Evaluation, Score, summarize
from qpass.verify.sites import SiteErrors, Taps, replaced, state_megabytes

Bases = Mapping[str, tuple[Step, ...]]


def evaluate(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    bases: Bases | None = None,
) -> Evaluation:
    """Compare `model` with `reference` on each row of each batch; a row is one window.

    Raises `BadInput` where there is nothing to compare. See `evaluate_many`.
    """
    given = None if bases is None else {"model": bases}
    return evaluate_many({"model": model}, reference, batches, bases=given)["model"]


def evaluate_many(
    models: Mapping[str, nn.Module],
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    bases: Mapping[str, Bases] | None = None,
) -> dict[str, Evaluation]:
    """Compare several models with one reference, which runs once for each batch.

    A batch is token ids `[b, t]`, a tuple of arguments or a dict of keyword arguments; padding is
    where its attention mask is 0. Memory holds the logits of one batch four times. `bases` tells
    for a model in which basis its modules' outputs are, for the errors of its sites.
    """
    for name, model in {**models, "reference": reference}.items():
        expect_instance(nn.Module, name, model, "a torch.nn.Module")
    changed = bases or {}
    sites = {
        name: SiteErrors(replaced(model, reference), changed.get(name, {}))
        for name, model in models.items()
    }
    scores: dict[str, list[Score]] = {name: [] for name in models}
    for scored in score_batches(models, reference, batches, sites=sites):
        for name, windows in scored.items():
            scores[name] += windows
    size = state_megabytes(reference)
    return {
        name: summarize(scores[name], state_megabytes(model), size, sites[name].results())
        for name, model in models.items()
    }


def score_batches(
    models: Mapping[str, nn.Module],
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    sites: Mapping[str, SiteErrors] | None = None,
) -> Iterator[dict[str, list[Score]]]:
    """The scores of each model for one batch after another, one score for each row.

    Callers that keep them can stop and go on later.
    """
    if isinstance(batches, Tensor | Mapping | str):
        raise BadInput(
            f"batches is one {type(batches).__name__}, not an iterable of them; wrap it in a list"
        )
    expect_instance(Iterable, "batches", batches, "an iterable of batches")
    errors = sites or {}
    watched = tuple(dict.fromkeys(path for one in errors.values() for path in one.paths))
    for batch in batches:
        with _measuring((reference, *models.values())), torch.no_grad():
            words = text(batch)
            tap = Taps(watched, words.real)
            with tap.on(reference):
                own = logits(reference, batch)
            expected = Expected.of(own, words)
            scored: dict[str, list[Score]] = {}
            for name, model in models.items():
                mine = Taps(errors[name].paths if name in errors else (), words.real)
                with mine.on(model):
                    # the reference itself may be among the models, and need not run again
                    found = own if model is reference else logits(model, batch)
                scored[name] = compare(found, expected)
                if name in errors:
                    errors[name].add(mine, tap)
        yield scored


@contextmanager
def _measuring(models: tuple[nn.Module, ...]) -> Generator[None]:
    """Every module in evaluation mode, as dropout would be measured too; restored after."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def windows(ids: Tensor, length: int) -> Tensor:
    """`[m, length]` consecutive windows of the token ids `[n]`; a shorter rest is left out."""
    if ids.dim() != 1:
        raise BadInput(f"windows are cut from a row of token ids, got shape {list(ids.shape)}")
    if length < 2 or len(ids) < length:
        raise BadInput(f"{len(ids)} tokens hold no window of {length}; a window has at least 2")
    m = len(ids) // length
    return ids[: m * length].reshape(m, length)
