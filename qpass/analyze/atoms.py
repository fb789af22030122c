"""What a tensor axis is made of: atoms, split and cut as the program views and slices it.

An axis (`Axis`) is a row-major product of references to atoms. An atom is a leaf, a product of
smaller atoms (a view split it) or a sum of parts (a slice cut it, or `cat` joined it). Equal axes
are tied by union-find; a tie may be *dual*, when one side changes by the inverse transpose of the
other, or, between diagonal changes, any power of it. Pins, sites and values are kept as events on
axes and resolved to leaves at the end, so that splitting an atom late loses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import sympy
import torch

Size = int | sympy.Expr
# 1, -1 for the inverse transpose, or the exponent of a positive diagonal change
Power = int | Fraction


def size_of(size: int | torch.SymInt) -> Size:
    """A size as a number or an expression, without adding guards."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return size


class Atom:
    """One factor or part of an axis; identity matters, so it is compared by `is`."""

    __slots__ = ("factors", "link", "parts", "power", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.link: Atom | None = None
        self.power: Power = 1
        self.factors: Axis | None = None
        self.parts: Axis | None = None


@final
@dataclass(frozen=True, slots=True)
class Ref:
    """An atom as one axis sees it: the axis changes by that power of the atom's change."""

    atom: Atom
    power: Power = 1


Axis = tuple[Ref, ...]


class Mismatch(Exception):
    """Two axes that must agree cannot be factored or cut alike; holds the reason."""


def fresh(size: Size) -> Axis:
    """A new axis of one atom; nothing at all for size 1."""
    return () if size == 1 else (Ref(Atom(size)),)


def length(axis: Axis) -> Size:
    """How many entries an axis has."""
    total: Size = 1
    for ref in axis:
        total = total * find(ref).atom.size
    return total


def empty(axis: Axis) -> bool:
    """Whether an axis has no entries."""
    return any(find(ref).atom.size == 0 for ref in axis)


def find(ref: Ref) -> Ref:
    """The atom that stands for everything tied to this one."""
    atom, power = ref.atom, ref.power
    while atom.link is not None:
        power *= atom.power
        atom = atom.link
    return Ref(atom, power)


def factors(axis: Axis) -> list[Ref]:
    """The axis as a product of atoms that are leaves or sums."""
    flat: list[Ref] = []
    for ref in map(find, axis):
        if ref.atom.factors is None:
            flat.append(ref)
        else:
            flat += factors(raised(ref.atom.factors, ref.power))
    return flat


def raised(axis: Sequence[Ref], power: Power) -> Axis:
    """The axis, changed by a power of its change: -1 for the inverse transpose."""
    return tuple(Ref(r.atom, r.power * power) for r in axis)


def twin(axis: Axis) -> Axis:
    """A new axis, tied to nothing, that is split and cut as this one is."""
    made: list[Ref] = []
    for ref in factors(axis):
        atom = Atom(ref.atom.size)
        if ref.atom.parts is not None:
            atom.parts = tuple(as_one(twin((part,))) for part in ref.atom.parts)
        made.append(Ref(atom))
    return tuple(made)


def split(ref: Ref, outer: Size) -> None:
    """Make a leaf a product of `outer` and the rest; raise `Mismatch` where that cannot be."""
    atom = find(ref).atom
    rest = _quotient(atom.size, outer)
    if rest is None:
        raise Mismatch(f"axes factored as {atom.size} and {outer} meet")
    if atom.parts is not None:
        raise Mismatch("an axis is cut into parts in one place and factored in another")
    atom.factors = (Ref(Atom(outer)), Ref(Atom(rest)))


def tie(left: Axis, right: Axis, *, power: Power = 1) -> list[Axis]:
    """Make the left axis change by a power of the right one's change.

    Returns the axes found to equal another power of their own change: O(n) alone allows -1.
    """
    own_power: list[Axis] = []
    index = 0
    while True:
        ls, rs = factors(left), factors(right)
        if index == len(ls) == len(rs):
            return own_power
        if index >= len(ls) or index >= len(rs):
            raise Mismatch("axes of different sizes meet")
        a, b = ls[index], rs[index]
        if a.atom is b.atom:
            if a.power != b.power * power:
                own_power.append((a,))
            index += 1
        elif a.atom.size == b.atom.size:
            own_power += _join(a, b, power)
            index += 1
        else:
            _split_larger(a, b)


def _split_larger(a: Ref, b: Ref) -> None:
    if _quotient(a.atom.size, b.atom.size) is not None:
        split(a, b.atom.size)
    else:
        split(b, a.atom.size)


def _join(a: Ref, b: Ref, power: Power) -> list[Axis]:
    own_power: list[Axis] = []
    # how the left atom changes, as a power of the right one's change
    relation = _ratio(b.power * power, a.power)
    if a.atom.parts is not None and b.atom.parts is not None:
        cuts = sorted({*_cuts(a.atom), *_cuts(b.atom)})
        _cut_at(a.atom, cuts)
        _cut_at(b.atom, cuts)
        for p, q in zip(a.atom.parts, b.atom.parts, strict=True):
            own_power += tie((p,), (q,), power=relation)
    if b.atom.parts is None:
        b.atom.link, b.atom.power = a.atom, _ratio(1, relation)
    else:
        a.atom.link, a.atom.power = b.atom, relation
    return own_power


def _ratio(a: Power, b: Power) -> Power:
    return a * b if b in (1, -1) else Fraction(a) / b


def _cuts(atom: Atom) -> list[int]:
    at, cuts = 0, [0]
    for part in atom.parts or ():
        size = part.atom.size
        if not isinstance(size, int):
            raise Mismatch("an axis is cut at a place only known at run time")
        at += size
        cuts.append(at)
    return cuts


def _cut_at(atom: Atom, cuts: Sequence[int]) -> None:
    """Cut a leaf or a sum at the given places, which include both ends."""
    if atom.parts is None:
        atom.parts = tuple(Ref(Atom(stop - start)) for start, stop in itertools.pairwise(cuts))
        return
    parts: list[Ref] = []
    old = _cuts(atom)
    for part, start, stop in zip(atom.parts, old[:-1], old[1:], strict=True):
        inner = [c - start for c in cuts if start < c < stop]
        root = find(part)
        if not inner:
            parts.append(part)
            continue
        if root.atom.factors is not None:
            raise Mismatch("an axis is factored in one place and cut into parts in another")
        _cut_at(root.atom, sorted({0, *inner, stop - start, *_inner_cuts(root.atom)}))
        parts += raised(root.atom.parts or (), root.power)
    atom.parts = tuple(parts)


def _inner_cuts(atom: Atom) -> list[int]:
    return [] if atom.parts is None else _cuts(atom)


def cut(axis: Axis, start: int, stop: int) -> Axis:
    """The entries `start` to `stop` of an axis; raise `Mismatch` if they have no structure."""
    flat = factors(axis)
    inner = 1
    for ref in flat[1:]:
        if not isinstance(ref.atom.size, int):
            raise Mismatch("a slice runs across an axis of symbolic size")
        inner *= ref.atom.size
    if not flat or not isinstance(flat[0].atom.size, int):
        raise Mismatch("a slice of an axis of symbolic size")
    if start % inner or stop % inner:
        raise Mismatch("a slice cuts through a factor of the axis")
    first = flat[0]
    low, high = start // inner, stop // inner
    total = flat[0].atom.size
    if (low, high) == (0, total):
        # a sum of one part would be a part of itself where the two are tied
        return axis
    known = _inner_cuts(first.atom)
    _cut_at(first.atom, sorted({0, low, high, total, *known}))
    at = _cuts(first.atom)
    picked = tuple(
        part for part, begin in zip(first.atom.parts or (), at, strict=False) if low <= begin < high
    )
    picked = raised(picked, first.power)
    head = picked if len(picked) == 1 else join(picked)
    return (*(r for r in head if find(r).atom.size != 1), *flat[1:])


def join(parts: Sequence[Ref]) -> Axis:
    """The concatenation of atoms, as one axis."""
    total: sympy.Expr = sympy.Add(*(find(r).atom.size for r in parts))
    atom = Atom(int(total) if total.is_Integer else total)
    atom.parts = tuple(parts)
    return (Ref(atom),)


def as_one(axis: Axis) -> Ref:
    """The axis as a reference to a single atom, wrapping a product if need be."""
    if len(axis) == 1:
        return axis[0]
    atom = Atom(length(axis))
    if axis:
        atom.factors = axis
    return Ref(atom)


def regroup(axes: Sequence[Axis], shape: Sequence[Size]) -> list[Axis]:
    """The same entries viewed in another shape; raise `Mismatch` when atoms cannot follow."""
    queue = [ref for axis in axes for ref in factors(axis)]
    out: list[Axis] = []
    for size in shape:
        taken: list[Ref] = []
        need = size
        while need != 1:
            if not queue:
                raise Mismatch("a view runs past the end of the tensor")
            ref = queue[0]
            rest = _quotient(need, ref.atom.size)
            if rest is not None:
                taken.append(queue.pop(0))
                need = rest
                continue
            if _quotient(ref.atom.size, need) is None:
                raise Mismatch(f"a view regroups {ref.atom.size} entries across factors")
            split(ref, need)
            queue[:1] = factors((ref,))
        out.append(tuple(taken))
    return out


def _quotient(a: Size, b: Size) -> Size | None:
    """`a / b` if `b` divides `a` for every value of their symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(a) / b))
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


@final
@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where a leaf lies on an axis: its offset, its stride, and the factors it lies among.

    `around` are the other factors on the path to the leaf, outermost first, as
    `(atom, size, stride)`; strides are None where a size is symbolic. `partial` says that the path
    goes through a part of a sum, so that the leaf does not run along the whole axis.
    """

    leaf: Ref
    offset: int
    stride: int | None
    around: tuple[tuple[Atom, Size, int | None], ...]
    partial: bool


def placements(axis: Axis) -> Iterator[Placement]:
    """Every leaf of an axis, with where it lies."""
    yield from _place(axis, offset=0, stride=1, around=(), partial=False)


def _place(
    axis: Axis,
    offset: int,
    stride: int | None,
    around: tuple[tuple[Atom, Size, int | None], ...],
    *,
    partial: bool,
) -> Iterator[Placement]:
    flat = factors(axis)
    strides: list[int | None] = []
    for ref in reversed(flat):
        strides.insert(0, stride)
        size = ref.atom.size
        stride = stride * size if stride is not None and isinstance(size, int) else None
    for i, ref in enumerate(flat):
        others = tuple(
            (other.atom, other.atom.size, strides[j]) for j, other in enumerate(flat) if j != i
        )
        context = _by_stride((*around, *others))
        if ref.atom.parts is None:
            yield Placement(ref, offset, strides[i], context, partial)
            continue
        at = 0
        for part in raised(ref.atom.parts, ref.power):
            step = strides[i]
            begin = offset + at * step if step is not None else offset
            yield from _place((part,), begin, step, context, partial=True)
            size = find(part).atom.size
            at += size if isinstance(size, int) else 0


def _by_stride(
    around: tuple[tuple[Atom, Size, int | None], ...],
) -> tuple[tuple[Atom, Size, int | None], ...]:
    return tuple(sorted(around, key=lambda item: -(item[2] or 0)))
