"""Is the choice that a model finds most likely scored as lm-eval scores it?"""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpass.errors import BadInput, Unsupported
from qpass.hf.choices import Question, read_questions, score_questions
from qpass.hf.harness import score_tasks

VOCABULARY = 128


class Bigrams(nn.Module):
    """A model of letters: how likely each follows another."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.shape == input_ids.shape
        return self.table[input_ids]


class Letters:
    """A tokenizer of letters."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": letters(text)}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def likely(model: Bigrams, context: str, choice: str) -> float:
    """What a choice has, letter by letter."""
    text = [1, *letters(context + choice)]
    log = model.table.detach().double().log_softmax(-1)
    pairs = list(itertools.pairwise(text))
    return sum(float(log[a, b]) for a, b in pairs[len(context.rstrip()) :])


QUESTIONS = [
    Question("ab", (" cd", " e", " fgh"), 1),
    Question("x ", ("yy", "zz"), 0),
    Question("", ("q", "rst"), 1),
    Question("one two", (" three", " 3", " III", " drei"), 3),
]


def test_the_most_likely_choice_counts() -> None:
    model = Bigrams()
    plain = normal = 0
    for q in QUESTIONS:
        found = [likely(model, q.context, choice) for choice in q.choices]
        each = [value / len(text) for value, text in zip(found, q.choices, strict=True)]
        plain += found.index(max(found)) == q.answer
        normal += each.index(max(each)) == q.answer
    acc, acc_norm = score_questions("t", model, letters, QUESTIONS, 1)
    assert (acc.metric, acc_norm.metric) == ("acc", "acc_norm")
    assert acc.value.value == plain / len(QUESTIONS)
    assert acc_norm.value.value == normal / len(QUESTIONS)
    assert acc.value.error is not None


def test_a_model_that_knows_is_right_and_one_that_errs_is_wrong() -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table.zero_()
        model.table[ord("a"), ord("b")] = 9
    knows = score_questions("t", model, letters, [Question("a", ("b", "c"), 0)] * 3, 1)
    errs = score_questions("t", model, letters, [Question("a", ("b", "c"), 1)] * 3, 1)
    assert [r.value.value for r in (*knows, *errs)] == [1, 1, 0, 0]


def test_a_token_across_the_end_of_the_context_belongs_to_the_choice() -> None:
    def pairs_of_letters(text: str) -> Sequence[int]:
        return [sum(map(ord, text[i : i + 2])) % VOCABULARY for i in range(0, len(text), 2)]

    (acc, _) = score_questions("t", Bigrams(), pairs_of_letters, [Question("a", ("b", "c"), 0)], 1)
    assert acc.value.value in (0, 1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "two or more"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "expected"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "2 of 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "expected"),
        ("", "no questions"),
    ],
)
def test_lines_that_are_no_questions_are_named(line: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(BadInput, match=why):
        read_questions(file)


def test_models_that_cannot_answer_are_refused() -> None:
    model = Bigrams()
    with pytest.raises(BadInput, match="itself fails"):
        score_questions("t", model, lambda _: [500, 3], QUESTIONS, 1)
    model.table = nn.Parameter(torch.zeros(600, VOCABULARY))
    with pytest.raises(BadInput, match="does not predict"):
        score_questions("t", model, lambda _: [500, 3], QUESTIONS, 1)
    with torch.no_grad():
        model.table.fill_(float("nan"))
    with pytest.raises(BadInput, match="not finite"):
        score_questions("t", model, letters, QUESTIONS, 1)


def questions_file(folder: Path) -> Path:
    file = folder / "q.jsonl"
    lines = [{"context": q.context, "choices": q.choices, "answer": q.answer} for q in QUESTIONS]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_without_the_harness_only_files_of_questions_are_scored(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    file = str(questions_file(tmp_path))
    found = score_tasks(Bigrams(), Letters(), [file], 2)
    assert [(r.task, r.metric) for r in found] == [(file, "acc"), (file, "acc_norm")]
    with pytest.raises(Unsupported, match="pip install lm_eval"):
        score_tasks(Bigrams(), Letters(), ["hellaswag"], None)


@pytest.fixture
def harness(monkeypatch) -> dict[str, object]:
    """What lm-eval 0.4 documents of itself, with results of its form; and what it was asked."""
    asked: dict[str, object] = {}

    def simple_evaluate(**options: object) -> dict[str, object]:
        asked.update(options)
        if options["tasks"] == ["unheard"]:
            raise KeyError("unheard")
        numbers = {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4}
        more = {"f1,strict": 0.25, "f1_stderr,strict": "N/A"}
        return {"results": {"mine": {**numbers, **more}}}

    package = types.ModuleType("lm_eval")
    models, tasks = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.tasks")
    huggingface = types.ModuleType("lm_eval.models.huggingface")
    vars(package)["simple_evaluate"] = simple_evaluate
    vars(huggingface)["HFLM"] = lambda **given: given
    vars(tasks)["TaskManager"] = lambda: "manager"
    for module in (package, models, huggingface, tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_tasks_of_the_harness_give_all_of_their_numbers(harness) -> None:
    model, tokenizer = Bigrams(), Letters()
    acc, f1 = score_tasks(model, tokenizer, ["mine"], 7)
    assert (acc.task, acc.metric, acc.value.value, acc.value.error) == ("mine", "acc", 0.5, 0.1)
    assert (f1.metric, f1.value.value, f1.value.error) == ("f1 (strict)", 0.25, None)
    assert harness["model"] == {"pretrained": model, "tokenizer": tokenizer}
    assert harness["limit"] == 7


def test_tasks_that_are_not_there_are_refused(harness) -> None:
    with pytest.raises(BadInput, match="no such task file"):
        score_tasks(Bigrams(), Letters(), ["missing.yaml"], None)
    with pytest.raises(BadInput, match="lm-eval cannot run unheard"):
        score_tasks(Bigrams(), Letters(), ["unheard"], None)
