"""How diagonal changes of products entry by entry are settled: `z = x * y` has `T_z = T_x T_y`.

Where one of the three is held, the other two are tied. Otherwise one factor is held by choice: the
changes that are left are a subgroup of all that would do.
"""

from __future__ import annotations

from collections.abc import Iterator

from qpass.analyze.atoms import Atom, Axis, Ref, factors, find, placements, raised
from qpass.analyze.constraints import Constraints, Factors
from qpass.rotations import Group


def settle(c: Constraints) -> None:
    """Turn what rules said about products into ties and pins; the whole program has been read."""
    pending, c.multiplied = c.multiplied, []
    while pending:
        pending = [one for product in pending for one in _by_leaf(product)]
        pinned = {place.leaf.atom for held in c.held for place in placements(held.axis)}
        rest = [product for product in pending if not _settled(product, pinned, c)]
        if rest and len(rest) == len(pending):
            first = rest.pop(0)
            c.node = first.node
            c.pin(first.x, "is held so that what it is multiplied with may be scaled")
            c.tie(first.z, first.y)
        pending = rest


def _settled(product: Factors, pinned: set[Atom], c: Constraints) -> bool:
    """Tie two of the three where the other is held; whether that is so."""
    x, y, z = product.x, product.y, product.z
    c.node = product.node
    if _same(x, y):
        _multiply_with_itself(product, c)
    elif _within(x, pinned):
        c.tie(z, y)
    elif _within(y, pinned):
        c.tie(z, x)
    elif _within(z, pinned):
        c.tie(x, y, power=-1)
    else:
        return False
    return True


def _multiply_with_itself(product: Factors, c: Constraints) -> None:
    power = factors(product.x)[0].power + factors(product.y)[0].power
    why = "is multiplied with itself"
    if power == 0 or c.allows(Group.SIGNS):
        c.pin(product.z, why)
        return
    c.limit(product.x, why, Group.POSITIVE_DIAGONAL)
    c.limit(product.z, why, Group.POSITIVE_DIAGONAL)
    (root,) = factors(product.x)
    c.tie(product.z, (Ref(root.atom),), power=power)


def _same(x: Axis, y: Axis) -> bool:
    """Whether both are one leaf, whatever the powers."""
    a, b = factors(x), factors(y)
    return len(a) == len(b) == 1 and a[0].atom is b[0].atom


def _within(axis: Axis, pinned: set[Atom]) -> bool:
    return all(place.leaf.atom in pinned for place in placements(axis))


def _by_leaf(product: Factors) -> Iterator[Factors]:
    """The same for each factor and part of the axes, as far as all three are made alike."""
    three = [factors(axis) for axis in (product.x, product.y, product.z)]
    sizes = [[ref.atom.size for ref in refs] for refs in three]
    if sizes[0] != sizes[1] or sizes[0] != sizes[2]:
        yield product
        return
    for x, y, z in zip(*three, strict=True):
        parts = [_parts(ref) for ref in (x, y, z)]
        cuts = [[find(part).atom.size for part in some] for some in parts]
        if not cuts[0] or cuts[0] != cuts[1] or cuts[0] != cuts[2]:
            yield Factors((x,), (y,), (z,), product.node)
            continue
        for some in zip(*parts, strict=True):
            a, b, c = ((ref,) for ref in some)
            yield from _by_leaf(Factors(a, b, c, product.node))


def _parts(ref: Ref) -> Axis:
    return raised(ref.atom.parts or (), ref.power)
