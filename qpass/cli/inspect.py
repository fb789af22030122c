"""`qpass inspect`: what of a model can be rotated, and why not the rest?"""

from __future__ import annotations

from qpass.cli.output import AsJson, emit
from qpass.cli.source import Model, load


def inspect(model: Model, as_json: AsJson = False) -> None:
    """List regions that may rotate, matrix products, and a reason for every refusal."""
    from qpass import api

    loaded = load(model)
    found = api.inspect(loaded.model, loaded.inputs)
    emit({table.title: table for table in found.tables()}, as_json=as_json)
