"""What the modules of a model can hold, and what is decided for its program within that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpass.capture.call import Inputs
from qpass.capture.export import evaluating, holds_values
from qpass.capture.results import plain
from qpass.ir import Program
from qpass.plan import Plan, Recipe
from qpass.plan.choose import choose
from qpass.plan.fits import expect_fits
from qpass.quantize.errors import SiteErrors
from qpass.targets.holding import find_holdable
from qpass.targets.replaceable import refusals
from qpass.targets.seams import find_seams, holds_turns
from qpass.targets.ties import reads_flag, tied_uses
from qpass.transform import Rewritten, fold_and_rewrite
from qpass.verify.exact import ExactCheck


@final
@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """What the modules of a model cannot hold: a reason by use, and whether `ties` must stay.

    Where they can hold a transform is recorded in the program.
    """

    refusals: Mapping[str, str]
    ties: bool

    def within(self, recipe: Recipe) -> Recipe:
        return replace(recipe, keep_tied=recipe.keep_tied or self.ties)


def bounds_of(model: nn.Module, program: Program, sample: Inputs, *, held: bool = True) -> Bounds:
    """What the modules of a model can hold; `held`: also in front of weights that stay float."""
    refused, tied = refusals(model, program), tied_uses(program)
    # what holds no values cannot be tried
    run = functools.partial(outputs_of, model, sample) if holds_values(model) else None
    with evaluating(model):
        ties = bool(tied) and run is not None and reads_flag(model, run)
        kept = find_holdable(model, program, refused, run) if held else frozenset[str]()
    if ties:
        why = "the model computes something else once its weights are not tied"
        refused = dict.fromkeys(tied, why) | refused
    program.seams = find_seams(model, program, refused, kept)
    return Bounds(refused, ties)


class Decide(Protocol):
    def __call__(self, folded: Program, *, pairs: bool) -> Plan: ...


def decider(
    known: Plan | None,
    given: Recipe,
    bounds: Bounds,
    errors: Callable[[Program], SiteErrors] | None = None,
    improve: Callable[[Program, Plan], Plan] = lambda _, plan: plan,
    *,
    calibrated: bool = False,
    convolutions: bool = False,
) -> Decide:
    """What to do to a folded program: as `known`, or as `given` within what modules can hold."""

    def decide(folded: Program, *, pairs: bool) -> Plan:
        if known is not None:
            expect_fits(known, folded)
            return known
        plan = choose(
            folded,
            bounds.within(given),
            refusals=bounds.refusals,
            stored=True,
            pairs=pairs,
            convolutions=convolutions,
            errors=None if errors is None else errors(folded),
            calibrated=calibrated,
        )
        return improve(folded, plan)

    return decide


def rewritten(
    model: nn.Module, program: Program, decide: Decide, check: ExactCheck | None
) -> Rewritten:
    """The program after what is decided, without pairs where the modules cannot hold them."""
    done = fold_and_rewrite(program, functools.partial(decide, pairs=True), check)
    if not done.plan.paired or holds_turns(model, program, done.program):
        return done
    return fold_and_rewrite(program, functools.partial(decide, pairs=False), check)


def outputs_of(model: nn.Module, sample: Inputs) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(sample, Mapping):
            result = model(**sample)
        elif isinstance(sample, Tensor):
            result = model(sample)
        else:
            result = model(*sample)
    leaves = pytree.tree_leaves(plain(dict(result) if isinstance(result, Mapping) else result))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
