"""How small, how fast and how good does a real language model get?"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

import torch

from examples.demo.measure import Quality, evaluate, export, time_rows
from examples.demo.rows import REFERENCE, Row
from examples.demo.settings import Settings, read
from examples.demo.store import open_store
from qpass.hf.pretrained import hide_progress
from qpass.hf.speed import Speed
from qpass.report import Cell, Table, json_text, progress, show
from qpass.report.quality import quality_cells
from qpass.runtime import native

# windows that ONNX Runtime reads, one after another in float32 products
ONNX_WINDOWS = 8

COLUMNS = (
    "model",
    "weights MB",
    "perplexity",
    "KL to float32",
    "same top-1",
    "embedding, head",
    "prefill tokens/s",
    "decode tokens/s",
)


def table(
    settings: Settings, qualities: Mapping[Row, Quality], speeds: Mapping[str, Speed]
) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for row, found in qualities.items():
        size = round(found.evaluation.megabytes, 1)
        speed = speeds.get(row.name)
        times = (None, None) if speed is None else (round(speed.prefill, 1), round(speed.decode, 1))
        rows.append((row.name, size, *quality_cells(found.evaluation), found.ends, *times))
    return Table(f"{settings.model.name} on {settings.text.name}", COLUMNS, tuple(rows))


def notes(settings: Settings, qualities: Mapping[Row, Quality], onnx: str) -> tuple[str, ...]:
    found = qualities[REFERENCE].evaluation
    chosen = {row.name: q.formats for row, q in qualities.items() if row.recipe == "auto"}
    return (
        f"quality: {found.windows} windows of {settings.length} tokens, evenly spaced over the "
        f"last {settings.tail} tokens of the text, no special tokens: {found.tokens} predicted "
        f"tokens, {found.positions} positions, in eager mode; ± is one standard error over windows",
        f"speed: {settings.length} tokens read with the last position's logits, then "
        f"{settings.new_tokens} written one by one into a static cache, batch 1, "
        f"{torch.get_num_threads()} threads, models in turn, medians of {settings.repetitions}; "
        "float32 is eager, the rest compiled, recipes by torch.compile(backend='qpass')",
        *(f"{name}: {formats}" for name, formats in chosen.items()),
        f"kernels: {native.load().text()}",
        f"onnx: {onnx}",
    )


def main(arguments: Sequence[str]) -> None:
    began = time.monotonic()
    settings = read(arguments)
    hide_progress()
    store = open_store(settings)
    texts = settings.evaluation()
    with progress() as advance:
        qualities = evaluate(settings, store, texts, advance)
        speeds = time_rows(settings, store, texts[:1], advance)
        advance("export", 0, 1)
        onnx = export(settings, store, texts[:ONNX_WINDOWS])
        advance("export", 1, 1)
    shown = table(settings, qualities, speeds)
    lines = notes(settings, qualities, onnx)
    show(shown)
    print(*lines, sep="\n")
    results = settings.output / "results.json"
    by_name = {row.name: found for row, found in qualities.items()}
    results.write_text(
        json_text({"table": shown, "notes": lines, "quality": by_name, "speed": speeds})
    )
    print(f"{time.monotonic() - began:.0f} s; the numbers as JSON: {results}")


if __name__ == "__main__":
    main(sys.argv[1:])
