"""Tasks of lm-eval, the harness that most results are published with: where it is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import nn

from qpass.errors import BadInput, Unsupported
from qpass.hf.choices import Encode, TaskResult, read_questions, score_questions
from qpass.verify.scores import Estimate

INSTALL = "pip install lm_eval"
STDERR = "_stderr"


def run_tasks(
    model: nn.Module, tokenizer: object, tasks: Sequence[str], limit: int | None
) -> tuple[TaskResult, ...]:
    """Every number that lm-eval gives for tasks: names that it knows, or YAML files of one.

    `limit` takes so many questions of each. Raises Unsupported where lm-eval is not installed, and
    BadInput for a task that it cannot load.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unsupported(
            f"the task {tasks[0]!r} needs lm-eval ({error}); {INSTALL}\n"
            "  questions in a .jsonl file are scored without it"
        ) from error
    harness: Any = lm_eval
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            raise BadInput(f"no such task file: {task}")
    try:
        found = harness.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=list(tasks),
            task_manager=TaskManager(),
            limit=limit,
            log_samples=False,
        )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise BadInput(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    return tuple(_results(cast("Mapping[str, Mapping[str, object]]", found["results"])))


def score_tasks(
    model: nn.Module,
    tokenizer: object,
    tasks: Sequence[str],
    limit: int | None,
) -> tuple[TaskResult, ...]:
    """The numbers of tasks in the order given: files of questions (`.jsonl`), or lm-eval's."""
    found: list[TaskResult] = []
    for task in tasks:
        if task.endswith(".jsonl"):
            questions = read_questions(Path(task))[:limit]
            found += score_questions(task, model, _encoder(tokenizer), questions, _start(tokenizer))
        else:
            found += run_tasks(model, tokenizer, [task], limit)
    return tuple(found)


def _encoder(tokenizer: object) -> Encode:
    words = cast("Any", tokenizer)

    def encode(text: str) -> Sequence[int]:
        return words(text, add_special_tokens=False, verbose=False)["input_ids"]

    return encode


def _start(tokenizer: object) -> int:
    """The token that stands in front of a text."""
    words = cast("Any", tokenizer)
    known = (words.bos_token_id, words.eos_token_id)
    return next((token for token in known if token is not None), 0)


def _results(tasks: Mapping[str, Mapping[str, object]]) -> list[TaskResult]:
    found: list[TaskResult] = []
    for task, numbers in tasks.items():
        for key, value in numbers.items():
            metric, _, chosen = key.partition(",")
            # what has no filter behind a comma is no metric
            counts = isinstance(value, int | float) and "," in key
            if metric.endswith(STDERR) or not counts:
                continue
            error = numbers.get(f"{metric}{STDERR},{chosen}")
            known = isinstance(error, int | float) and math.isfinite(error)
            estimate = Estimate(
                float(cast("float", value)), float(cast("float", error)) if known else None
            )
            name = metric if chosen in ("", "none") else f"{metric} ({chosen})"
            found.append(TaskResult(task, name, estimate))
    return found
