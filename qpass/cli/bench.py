"""`qpass bench`: how many tokens a second?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qpass.cli.output import AsJson, emit
from qpass.cli.source import Model, load

if TYPE_CHECKING:
    from qpass.hf.speed import Speed


def bench(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="A second model, timed in turn with the first.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed runs; medians are shown.")] = 7,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time reading a prompt and writing tokens, batch 1, with a static cache."""
    import torch

    from qpass.hf.speed import causal, measure, random_prompt
    from qpass.report import progress

    models = {
        name: causal(name, load(name).model) for name in (model, reference) if name is not None
    }
    if not eager:
        for found in models.values():
            found.compile()
    ids = random_prompt(models.values(), prompt)
    with progress() as advance:
        speeds = measure(models, ids, new_tokens=tokens, repetitions=repetitions, progress=advance)
    if as_json:
        threads = torch.get_num_threads()
        emit({"threads": threads, "torch": torch.__version__, "speed": speeds}, as_json=True)
    else:
        _show(speeds)


def _show(speeds: dict[str, Speed]) -> None:
    from qpass.report import Table

    rows = tuple((name, found.prefill, found.decode) for name, found in speeds.items())
    columns = ("model", "prefill tokens/s", "decode tokens/s")
    emit({"speed": Table("", columns, rows)}, as_json=False)
