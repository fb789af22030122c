"""How good and how fast is each row, and what does its ONNX file compute?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import transformers as hf
from torch import Tensor

import qpass
from examples.demo.rows import (
    EXPORTED,
    REFERENCE,
    ROWS,
    Row,
    compiled,
    ends,
    formats,
    load,
    save,
    weights_size,
)
from examples.demo.settings import Settings
from examples.demo.store import Store
from qpass.export import OnnxModel
from qpass.hf.speed import Speed, measure
from qpass.report import Progress, json_text, megabytes
from qpass.verify import Evaluation, score_batches, summarize


@dataclass(frozen=True, slots=True)
class Quality:
    """A row's evaluation, and how the model is stored."""

    evaluation: Evaluation
    ends: str
    formats: str


def weights(row: Row, settings: Settings, store: Store) -> Path:
    """The folder with a row's weights."""
    if row == REFERENCE:
        return settings.model
    return store.done(row.name, lambda folder: save(row, settings, folder))


def evaluate(
    settings: Settings, store: Store, texts: Tensor, advance: Progress
) -> dict[Row, Quality]:
    """Every row against the float model, which runs once for each window."""
    models: dict[Row, hf.PreTrainedModel] = {}
    for at, row in enumerate(ROWS):
        advance("quantize", at, len(ROWS))
        models[row] = load(row, weights(row, settings, store))
    advance("quantize", len(ROWS), len(ROWS))
    for at, text in enumerate(texts):
        advance("evaluate", at, len(texts))
        todo = {
            row.name: model for row, model in models.items() if at not in store.scores(row.name)
        }
        for scored in score_batches(todo, models[REFERENCE], [text[None]] if todo else []):
            for name, (score,) in scored.items():
                store.add_score(name, at, score)
    advance("evaluate", len(texts), len(texts))
    sizes = {row: weights_size(weights(row, settings, store)) for row in ROWS}
    found: dict[Row, Quality] = {}
    for row, model in models.items():
        scores = store.scores(row.name)
        ordered = [scores[at] for at in range(len(texts))]
        evaluation = summarize(ordered, sizes[row], sizes[REFERENCE])
        found[row] = Quality(evaluation, ends(model), formats(model))
    return found


def time_rows(
    settings: Settings, store: Store, prompt: Tensor, advance: Progress
) -> dict[str, Speed]:
    """Prefill and decode of the timed rows, in one process, taking turns."""

    def write(file: Path) -> None:
        models = {row.name: compiled(row, settings) for row in ROWS if row.timed}
        found = measure(
            models,
            prompt,
            new_tokens=settings.new_tokens,
            repetitions=settings.repetitions,
            progress=advance,
        )
        file.write_text(json_text(found))

    entries = json.loads(store.done("speed.json", write).read_text())
    return {name: Speed(**entry) for name, entry in entries.items()}


def export(settings: Settings, store: Store, texts: Tensor) -> str:
    """Write the ONNX file of one row; say how far what it computes on `texts [m, t]` is."""
    model = load(EXPORTED, weights(EXPORTED, settings, store))
    text = texts[:1]

    def write(folder: Path) -> None:
        folder.mkdir()
        qpass.export_onnx(model, text, folder / "model.onnx", verify=False)

    file = store.done("onnx", write) / "model.onnx"
    found = qpass.onnx_parity(model, text, file)
    size = megabytes(sum(part.stat().st_size for part in file.parent.iterdir()))
    scored = qpass.evaluate(OnnxModel(model, file), model, list(texts.split(1)))
    ratio = scored.perplexity_ratio
    assert ratio is not None
    return (
        f"{file}, {EXPORTED.name}, {size:.1f} MB: outputs of ONNX Runtime differ from PyTorch's by "
        f"at most {found.error:.1e} (relative norm of one output, {text.shape[1]} tokens); its "
        f"perplexity is {ratio.value:.5f} times PyTorch's ({len(texts)} windows); "
        f"{found.operators.get('MatMulNBits', 0)} products stay on integer weights, "
        f"{found.operators.get('MatMul', 0)} do not"
    )
