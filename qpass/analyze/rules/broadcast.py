"""How the axes of two operands line up when one is broadcast against the other."""

from __future__ import annotations

from qpass.analyze.atoms import Axis
from qpass.analyze.constraints import Constraints, Layout
from qpass.rotations import Group


def merge(c: Constraints, left: Layout, right: Layout, *, constant: str | None) -> Layout:
    """Tie the axes of two operands from the last on; axes that only one has pass through.

    An operand that lacks an axis is constant along it. If that matters, as in a sum, `constant`
    says why, and the axis is limited to changes that keep constants.
    """
    rank = max(len(left), len(right))
    a: Layout = ((),) * (rank - len(left)) + left
    b: Layout = ((),) * (rank - len(right)) + right
    out: list[Axis] = []
    for x, y in zip(a, b, strict=True):
        if x and y:
            c.tie(x, y)
        elif (x or y) and constant is not None:
            c.limit(x or y, constant, Group.ORTHOGONAL_ONES)
        out.append(x or y)
    return tuple(out)
