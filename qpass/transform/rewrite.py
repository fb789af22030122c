"""Carry out the exact half of a plan, and undo what does not keep its promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar, final

from qpass.analyze import by_name, find_gain, rotatable_regions
from qpass.errors import ContractBroken
from qpass.ir import Check, Note, Pass, Program, run_passes
from qpass.plan import Declined, Plan
from qpass.transform.change_regions import ChangeRegions
from qpass.transform.fold_norms import FoldNorms, scaled_value
from qpass.transform.fold_scales import FoldScales
from qpass.transform.insert_online import InsertOnline
from qpass.transform.insert_pairs import InsertPairs
from qpass.transform.rotate_regions import RotateRegions
from qpass.verify.exact import PASS_LIMIT, TOTAL_LIMIT, ExactCheck

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Rewritten:
    """The program after a plan's rotations, and the plan without those that were undone.

    `error` is how far all of it moved the outputs, relative and in float64; None if not measured.
    """

    program: Program
    plan: Plan
    notes: tuple[Note, ...]
    error: float | None = None


def fold_and_rewrite(
    program: Program, decide: Callable[[Program], Plan], check: ExactCheck | None
) -> Rewritten:
    """Carry out what `decide` says of the program with its norms folded.

    The result is compared with `program` as a whole; where that is not exact, everything is done
    again and each step is checked and undone by itself. Without `check` nothing is verified.
    Raises `ContractBroken` where the steps that stood are not exact together.
    """
    for each in (None, check):
        folded, _ = run_passes(program, [FoldNorms(), FoldScales()], each)
        done = carry_out(program, folded, decide(folded), each)
        if check is None:
            return done
        error = 0.0 if done.program is program else check.error(program, done.program)
        if error <= (PASS_LIMIT if each is None else TOTAL_LIMIT):
            return replace(done, error=error)
    raise ContractBroken(
        f"the rewritten model moved its outputs by {error:.1e} (limit {TOTAL_LIMIT:.0e}, "
        "float64); the model is unchanged\n  please report this, with the model's code"
    )


def carry_out(
    program: Program, folded: Program, plan: Plan, check: Check | None = None
) -> Rewritten:
    """Carry out a plan that was made for `folded`, and fold only the norms for which it matters.

    Those normalise values that change basis. The others keep their gains, which would rescale the
    columns of weights whose grids may fit as they are.
    """
    turning = {choice.region for choice in (*plan.rotated, *plan.paired)}
    regions = by_name(rotatable_regions(folded)) if turning else {}
    wanted = turning & regions.keys()
    values = {span.value for name in wanted for span in regions[name].spans}
    scaled = {n.name: scaled_value(program, n) for n in program.graph.nodes}
    every = {name: value for name, value in scaled.items() if value is not None}
    moving = frozenset(name for name, value in every.items() if value.name in values)
    start, notes = run_passes(program, [FoldNorms(moving)], check) if moving else (program, [])
    # a region can be called by a bias that only the fold of another norm makes
    if wanted and moving != every.keys() and not wanted <= by_name(rotatable_regions(start)).keys():
        start, notes = run_passes(program, [FoldNorms()], check)
    if multiplied := values & {node.name for node in start.graph.nodes if find_gain(start, node)}:
        start, more = run_passes(start, [FoldScales(frozenset(multiplied))], check)
        notes = [*notes, *more]
    done = rewrite(start, plan, check)
    return replace(done, notes=(*notes, *done.notes))


def rewrite(program: Program, plan: Plan, check: Check | None = None) -> Rewritten:
    """Rotate and change regions, some only in part, and insert transforms in front of products.

    When `check` refuses a whole group of choices, its halves are tried apart, so that one bad
    region does not cost the others.
    """
    after, rotated, notes = _apply(program, plan.rotated, RotateRegions, check)
    after, changed, behind = _apply(after, plan.changed, ChangeRegions, check)
    after, paired, between = _apply(after, plan.paired, InsertPairs, check)
    after, online, more = _apply(after, plan.online, InsertOnline, check)
    undone = tuple(
        Declined(name, "its transform was undone: the outputs moved")
        for name in (
            *(r.region for r in plan.rotated if r not in rotated),
            *(c.region for c in plan.changed if c not in changed),
            *(p.region for p in plan.paired if p not in paired),
            *(o.site for o in plan.online if o not in online),
        )
    )
    kept = replace(
        plan,
        rotated=rotated,
        changed=changed,
        paired=paired,
        online=online,
        declined=(*plan.declined, *undone),
    )
    return Rewritten(after, kept, (*notes, *behind, *between, *more))


def _apply(
    program: Program,
    choices: tuple[T, ...],
    make: Callable[[tuple[T, ...]], Pass],
    check: Check | None,
) -> tuple[Program, tuple[T, ...], tuple[Note, ...]]:
    if not choices:
        return program, (), ()
    after, notes = run_passes(program, [make(choices)], check)
    if after is not program:
        return after, choices, tuple(notes)
    if len(choices) == 1:
        return program, (), tuple(notes)
    middle = len(choices) // 2
    after, first, before = _apply(program, choices[:middle], make, check)
    after, second, behind = _apply(after, choices[middle:], make, check)
    return after, (*first, *second), (*before, *behind)
