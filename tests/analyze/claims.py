"""What does a rule claim about a call, and does the call do that: no less, and no more?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qpass.analyze.atoms import Atom, placements
from qpass.analyze.solution import Solution, collect
from qpass.ir import Program
from qpass.rotations import Group
from qpass.rotations.elements import contains
from tests.analyze import draw_along, draw_indexing, draw_masks, draw_products, draw_views
from tests.analyze.calls import Call
from tests.analyze.changes import Change, element
from tests.analyze.draws import calls

# importing each of these says how its operators are drawn
__all__ = ["draw_along", "draw_indexing", "draw_masks", "draw_products", "draw_views"]

aten = torch.ops.aten

# a true claim measures below 1e-14 here, a false one above 1e-4
LIMIT = 1e-10

# what a rule refuses although it would hold, and why nobody needs it
_ROOT = "the square root of a sign, for an axis that is tied to the result, is none"
CONSERVATIVE: dict[tuple[object, str, Group], str] = {
    (aten.rms_norm.default, "was folded away", Group.PERMUTATION): "all ones, permuted or not",
    (aten.layer_norm.default, "was folded away", Group.PERMUTATION): "all ones, permuted or not",
    (aten.square.default, "aten.square acts on each entry", Group.DIAGONAL): _ROOT,
    (aten.pow.Tensor_Scalar, "aten.pow acts on each entry", Group.DIAGONAL): _ROOT,
    (aten.mul.Tensor, "is multiplied with itself", Group.DIAGONAL): _ROOT,
}

# each group with the smallest that contain it
STEPS = [
    (small, large)
    for small in Group
    for large in Group
    if small < large and not any(small < between < large for between in Group)
]
PLANES = (Group.PLANE_ROTATIONS, Group.PLANE_SCALES, Group.ROPE_PLANES)


examples = settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])


class Claims:
    """What the rule says about one call under one group."""

    def __init__(self, call: Call, group: Group, *, weights: bool = True) -> None:
        self.call = call
        program, self.uses, self.results = call.program
        if not weights:
            kept = {name: weight for name, weight in program.weights.items() if weight.steps}
            program = Program(program.graph, kept, program.sources, {})
        self.constraints = collect(program, group, boundary=False)
        self.solution = Solution(self.constraints)
        self.group = group

    def free(self) -> list[Atom]:
        """The leaves that may change under the group."""
        odd = lambda leaf: self.group in PLANES and leaf.size % 2  # noqa: E731
        return [a for a in self.solution.leaves if not self.solution.pins.get(a) and not odd(a)]

    def holds(self, change: Change) -> bool:
        """Whether changing the operands and undoing it on the results changes nothing."""
        layouts = self.constraints.layouts
        changed = {
            id(x): change.apply(x, layouts[use]) if x.is_floating_point() else x
            for x, use in zip(self.call.operands(), self.uses, strict=True)
        }
        got = self.call.run(changed)
        for want, made, node in zip(self.call.wanted, got, self.results, strict=True):
            if not want.is_floating_point():
                if not torch.equal(want, made):
                    return False
                continue
            undone = change.apply(made, layouts[node], undo=True)
            scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
            if not bool(((undone - want).abs() <= LIMIT * scale).all()):
                return False
        return True

    def where(self, leaf: Atom) -> frozenset[tuple[object, ...]]:
        """Where a leaf lies: what recognises it under another group."""
        return frozenset(
            (node.name, i, place.offset, place.stride, leaf.size)
            for node in (*self.uses, *self.results)
            for i, axis in enumerate(self.constraints.layouts[node])
            for place in placements(axis)
            if place.leaf.atom is leaf
        )


def try_claims(target: object) -> None:
    """Raise AssertionError where the rule of an operator claims something false."""

    @examples
    @given(data=st.data())
    def claimed(data: st.DataObject) -> None:
        call = data.draw(calls(target))
        weights = data.draw(st.booleans())
        for group in Group:
            claims = Claims(call, group, weights=weights)
            for i, leaf in enumerate(claims.free()):
                change = element(group, leaf, claims.solution.head(leaf), seed=i)
                assert claims.holds(change), f"{group} of {claims.where(leaf)}"

    claimed()


def try_refusals(target: object) -> None:
    """Raise AssertionError where the rule of an operator refuses something true."""
    held: set[tuple[str, Group]] = set()
    broke: set[tuple[str, Group]] = set()

    @examples
    @given(call=calls(target))
    def try_refused(call: Call) -> None:
        claims = {group: Claims(call, group) for group in Group}
        for small, large in STEPS:
            for changes, whys in refused(claims[small], claims[large]):
                works = all(claims[small].holds(change) for change in changes)
                (held if works else broke).update((w, large) for w in whys)

    try_refused()
    for why, group in held - broke:
        assert (target, why, group) in CONSERVATIVE, f"{why!r} refuses {group}, which works"


def refused(small: Claims, large: Claims) -> Iterator[tuple[list[Change], set[str]]]:
    """Changes by the larger group where only the smaller is granted, and why they are refused.

    A single change may leave alone what the operator looks at, so there are several of each leaf.
    """
    pinned = {large.where(leaf): leaf for leaf in large.solution.leaves}
    for i, leaf in enumerate(small.solution.leaves):
        twin = pinned.get(small.where(leaf))
        if twin is None or not (pins := large.solution.pins.get(twin)):
            continue
        if (small.group is not Group.IDENTITY and small.solution.pins.get(leaf)) or (
            large.group in PLANES and leaf.size % 2
        ):
            continue
        drawn = (element(large.group, leaf, None, seed) for seed in range(i, i + 9))
        larger = [change for change in drawn if not contains(small.group, change.matrices[0])]
        if larger:
            yield larger[:3], {pin.why for pin in pins}
