"""How often a language model finds the right answer of several most likely."""

# c choices of a question, t tokens, v vocabulary

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, final

import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.verify.calls import logits
from qpass.verify.scores import Estimate, mean

Encode = Callable[[str], Sequence[int]]
SHAPE = 'an object with "context", "choices" (two or more) and "answer" (which of them, from 0)'


@final
@dataclass(frozen=True, slots=True)
class Question:
    """What a model reads, how it could go on, and which of these is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


@final
@dataclass(frozen=True, slots=True)
class TaskResult:
    """One number of one task, with its standard error over questions."""

    task: str
    metric: str
    value: Estimate


def read_questions(file: Path) -> tuple[Question, ...]:
    """The questions of a file of JSON lines."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: is no text that can be read ({error})") from error
    found = [_question(f"{file}:{at}", line) for at, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BadInput(f"{file}: has no questions; each line is {SHAPE}")
    return tuple(found)


def _question(where: str, line: str) -> Question:
    try:
        record: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: is not JSON ({error})") from error
    fields = cast("Mapping[str, object]", record) if isinstance(record, dict) else {}
    context, choices, answer = (fields.get(k) for k in ("context", "choices", "answer"))
    texts = cast("list[object]", choices) if isinstance(choices, list) else []
    whole = len(texts) > 1 and all(isinstance(text, str) and text for text in texts)
    if not (isinstance(context, str) and whole and type(answer) is int):
        raise BadInput(f"{where}: expected {SHAPE}")
    if not 0 <= answer < len(texts):
        raise BadInput(f"{where}: the answer is {answer} of {len(texts)} choices, counted from 0")
    return Question(context, cast("tuple[str, ...]", tuple(texts)), answer)


def score_questions(
    task: str, model: nn.Module, encode: Encode, questions: Sequence[Question], start: int
) -> tuple[TaskResult, TaskResult]:
    """How often the right choice is the most likely: as it is (`acc`), and for each character.

    Choices follow their context as they stand, and are read in its tokens: spaces at the end of a
    context count to the choices. An empty context is the token `start`.
    """
    plain: list[float] = []
    normal: list[float] = []
    for at, question in enumerate(questions, 1):
        pairs = [_pair(encode, question.context, choice, start) for choice in question.choices]
        likely = _log_likelihoods(f"{task}: question {at}", model, pairs)
        each = [value / len(text) for value, text in zip(likely, question.choices, strict=True)]
        plain.append(float(max(range(len(each)), key=likely.__getitem__) == question.answer))
        normal.append(float(max(range(len(each)), key=each.__getitem__) == question.answer))
    ones = [1] * len(questions)
    return tuple(  # pyright: ignore[reportReturnType]  two of two
        TaskResult(task, metric, cast("Estimate", mean(right, ones)))
        for metric, right in (("acc", plain), ("acc_norm", normal))
    )


def _pair(encode: Encode, context: str, choice: str, start: int) -> tuple[list[int], int]:
    """The tokens of a context and a choice, and how many of them are the choice's."""
    bare = context.rstrip()
    own = list(encode(bare)) if bare else []
    whole = list(encode(context + choice))
    # a tokenizer may join the end of one text with the start of the other
    own = own[: len(whole) - 1]
    tokens = whole if own else [start, *whole]
    return tokens, len(whole) - len(own)


def _log_likelihoods(
    where: str, model: nn.Module, pairs: Sequence[tuple[Sequence[int], int]]
) -> list[float]:
    longest = max(len(tokens) for tokens, _ in pairs)
    ids_ct = torch.zeros(len(pairs), longest, dtype=torch.int64, device="cpu")
    mask_ct = torch.zeros_like(ids_ct)
    for row, (tokens, _) in enumerate(pairs):
        ids_ct[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device="cpu")
        mask_ct[row, : len(tokens)] = 1
    device = next((p.device for p in (*model.parameters(), *model.buffers())), ids_ct.device)
    batch = {"input_ids": ids_ct.to(device), "attention_mask": mask_ct.to(device)}
    with torch.no_grad():
        predicted = logits(model, batch).float().cpu()
    if predicted.dim() != 3 or predicted.shape[:2] != ids_ct.shape:
        raise BadInput(f"{where}: the model predicts no next token, which choices are scored by")
    if int(ids_ct.max()) >= predicted.shape[-1]:
        raise BadInput(f"{where}: the tokenizer has tokens that the model does not predict")
    found: list[float] = []
    for row, (tokens, count) in enumerate(pairs):
        asked = slice(len(tokens) - count - 1, len(tokens) - 1)
        log_tv = predicted[row, asked].log_softmax(-1)
        found.append(float(_taken(log_tv, ids_ct[row, len(tokens) - count : len(tokens)])))
    if any(value != value for value in found):
        raise BadInput(f"{where}: the model's logits are not finite")
    return found


def _taken(log_tv: Tensor, ids_t: Tensor) -> Tensor:
    return log_tv.gather(-1, ids_t.unsqueeze(-1)).double().sum()
