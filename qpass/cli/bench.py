"""`qpass bench`: what can this machine do, and how much of that does a model reach?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qpass.cli.output import AsJson, emit
from qpass.cli.source import load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qpass.hf.speed import Speed
    from qpass.report import Table
    from qpass.runtime.products import Product
    from qpass.runtime.roofline import Limits


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A directory, a GGUF file, a hub id, or package.module:factory; without one, only "
            "the machine is measured.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="A second model, timed in turn with the first.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after it.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed runs; medians are shown.")] = 7,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Also time float models in bfloat16 by inductor, and in int8 by ONNX Runtime, "
            "OpenVINO (with nncf) and, from a GGUF file, llama.cpp, where these are installed.",
        ),
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="For each limit and each product that is timed.")
    ] = 0.1,
    largest: Annotated[
        int, typer.Option(min=1, help="Megabytes that are read to measure memory.")
    ] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure the machine, then the products of a model and its prompt and tokens, batch 1."""
    import torch

    from qpass.report import Table, progress
    from qpass.report.speed import machine_table, product_table
    from qpass.runtime import roofline

    machine = roofline.measure(seconds=seconds, largest=largest * 2**20)
    result: dict[str, object] = {"machine": machine if as_json else machine_table(machine)}
    if as_json:
        result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if model is not None:
        from qpass.engines import opened
        from qpass.hf.speed import (
            causal,
            float_models,
            in_bfloat16,
            measure,
            products,
            random_prompt,
        )

        names = (name for name in (model, reference) if name is not None)
        models = {name: causal(name, load(name).model) for name in names}
        limits = machine.all_threads
        multiplied = {
            name: {n: products(found, n, limits, seconds=seconds) for n in (1, prompt)}
            for name, found in models.items()
        }
        allowed = {name: _allowed(found, limits) for name, found in multiplied.items()}
        compared = float_models(models, multiplied) if peers else {}
        models |= in_bfloat16(compared)
        ids = random_prompt(models.values(), prompt)
        size = {"room": prompt + tokens, "threads": torch.get_num_threads()}
        # what is compiled is exported no more
        with opened(compared, **size) as (others, left), progress() as advance:
            if not eager:
                for found in models.values():
                    found.compile()
            readers = {**models, **others}
            speeds = measure(
                readers, ids, new_tokens=tokens, repetitions=repetitions, progress=advance
            )
        if as_json:
            result |= {"products": multiplied, "allowed": allowed, "speed": speeds, "left": left}
        else:
            for name, found in multiplied.items():
                several = [p for length in found.values() for p in length]
                result[f"products of {name}"] = product_table(f"products of {name}", several)
            result["speed"] = _speed_table(speeds, allowed)
            if left:
                result["left"] = Table("not timed", ("what", "why"), tuple(left.items()))
    emit(result, as_json=as_json)


def _allowed(found: Mapping[int, Sequence[Product]], limits: Limits) -> dict[str, float | None]:
    """Tokens a second that the limits allow for the products alone: of a prompt, and one by one."""
    from qpass.runtime.products import allowed

    lengths = {"prefill": max(found), "decode": 1}
    times = {what: allowed(found[length], limits) for what, length in lengths.items()}
    return {what: lengths[what] / time if time else None for what, time in times.items()}


def _speed_table(
    speeds: Mapping[str, Speed], allowed: Mapping[str, Mapping[str, float | None]]
) -> Table:
    from qpass.report import Table

    rows = tuple(
        (name, s.prefill, bound.get("prefill"), s.decode, bound.get("decode"))
        for name, s in speeds.items()
        for bound in [allowed.get(name, {})]
    )
    columns = ("model", "prefill tokens/s", "allowed", "decode tokens/s", "allowed")
    return Table("the whole model, beside what the limits allow for its products", columns, rows)
