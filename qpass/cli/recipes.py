"""`qpass recipes`: which presets are there, and what do they hold?"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qpass.cli.output import AsJson, emit

if TYPE_CHECKING:
    from qpass.formats import QuantSpec

_COLUMNS = ("recipe", "weights", "activations", "rotation", "rounding", "head", "embedding")


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A preset or a file, printed whole as TOML.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the presets, or print one as a file to start from."""
    from qpass.plan import Recipe, preset_names
    from qpass.report import Table

    if name is not None:
        recipe = Recipe.read(name)
        if as_json:
            emit(recipe.table(), as_json=True)
        else:
            sys.stdout.write(recipe.toml())
        return
    found = [Recipe.read(preset) for preset in preset_names()]
    if as_json:
        emit({recipe.name: recipe.table() for recipe in found}, as_json=True)
        return
    rows = tuple(
        (r.name, _spec(r.weight), _spec(r.activation), r.rotation, r.rounding, r.head, r.embedding)
        for r in found
    )
    emit({"recipes": Table("", _COLUMNS, rows)}, as_json=False)


def _spec(spec: QuantSpec | None) -> str:
    if spec is None:
        return "float"
    kind = "symmetric" if spec.symmetric else "asymmetric"
    per = "token" if spec.dynamic and spec.block == "channel" else spec.block
    where = f"block of {per}" if isinstance(per, int) else per
    scales = f", {spec.scale_format} scales" if spec.one_factor else ""
    when = ", static" if spec.static else ""
    return f"{spec.format} {kind}, per {where}{scales}{when}"
