"""Runs the passes on a model and writes the result back, as the public functions do."""

from __future__ import annotations

import dataclasses

from torch import nn

from qpass.capture.export import capture
from qpass.ir import Note, run_passes
from qpass.plan import Recipe
from qpass.plan.choose import choose
from qpass.targets.module import write_back
from qpass.targets.replaceable import refusals
from qpass.targets.replacing import Encode, nearest
from qpass.transform import FoldNorms, InsertOnline, RotateRegions

ROTATE = Recipe("rotate", head="float", embedding="float")


def apply(
    model: nn.Module,
    inputs: object,
    recipe: str | Recipe = ROTATE,
    *,
    encode: Encode = nearest,
    **changes,
) -> list[Note]:
    recipe = dataclasses.replace(Recipe.read(recipe), **changes)
    before = capture(model, inputs).program
    folded, notes = run_passes(before, [FoldNorms()])
    refused = refusals(model, before)
    plan = choose(folded, recipe, refusals=refused, stored=True)
    after, more = run_passes(folded, [RotateRegions(plan.rotated), InsertOnline(plan.online)])
    return [*notes, *more, *write_back(model, before, after, plan, encode)]
