"""Which regions turn in part: fewer transforms run between the parts than before products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from qpass.analyze import Matmul, Region, Role
from qpass.analyze.parts import Parts, Value, find_parts
from qpass.ir import Program, read
from qpass.plan.place import Fork, cheapest, total
from qpass.plan.plan import Paired
from qpass.plan.recipe import Recipe
from qpass.rotations import ROTATIONS, Group, Transform

# a lifted transform also adds a multiple of one vector: about as much work for each entry
_LIFTED = 4


@final
@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where the pairs of a region stand: the parts that turn, and who reads each value anew.

    `forward` are values that are turned for these readers, `back` those that are turned back.
    `whole` are values of `forward` that what makes them may turn, as all that read them do.
    """

    parts: Parts
    turned: frozenset[int]
    forward: Mapping[str, tuple[str, ...]]
    back: Mapping[str, tuple[str, ...]]
    whole: frozenset[str]

    @property
    def transforms(self) -> int:
        """How many transforms run with the program."""
        return len(self.forward) + len(self.back)


def place(program: Program, parts: Parts, choice: Paired) -> Placement | None:
    """Where the pairs of a choice cost least here; None where its weights cannot turn."""
    wanted = set(choice.turned)
    turned = {i for i, part in enumerate(parts.parts) if wanted.intersection(part.names)}
    plain = {i for i, part in enumerate(parts.parts) if part.names or part.pins} - turned
    if any(parts.parts[i].pins for i in turned):
        return None
    forks = _forks(program, parts, lifted=choice.transform.lifted)
    found = cheapest(forks, turned, plain)
    return None if found is None else _placement(program, parts, found)


def choose_pairs(
    program: Program,
    recipe: Recipe,
    regions: Sequence[Region],
    products: Sequence[Matmul],
    *,
    held: Collection[str] = (),
    stored: bool = False,
) -> tuple[Paired, ...]:
    """The pairs for pinned regions that `products`, which nothing else reaches, read.

    A region is left to transforms in front of its products unless that costs more. With `stored`,
    all uses of a stored tensor turn, or none.
    """
    wanted = {r.name: w for r in regions if r.pins and len(w := _values(r, products)) > 1}
    pinned = [region for region in regions if region.name in wanted]
    if not pinned or recipe.rotation == "off":
        return ()
    best: dict[str, tuple[int, Paired]] = {}
    for group in (Group.ORTHOGONAL, Group.ORTHOGONAL_ONES):
        for parts in find_parts(program, pinned, group, held=held):
            name = parts.region.name
            transform = Transform(
                recipe.online,
                parts.region.width,
                recipe.seed,
                lifted=group is Group.ORTHOGONAL_ONES,
            )
            bound = _Bound.of(program, parts, stored=stored, keep_tied=recipe.keep_tied)
            found = _pair(program, parts, wanted[name], transform, bound)
            if found is not None and (name not in best or found[0] < best[name][0]):
                best[name] = found
    return tuple(paired for _, paired in best.values())


def _values(region: Region, products: Sequence[Matmul]) -> dict[str, set[str]]:
    """The products that read all of a region as their input, by that value."""
    sites = {(s.use, s.axis) for s in region.sites if s.block.width == region.width}
    whole = {span.value for span in region.spans}
    found: dict[str, set[str]] = {}
    for matmul in products:
        if (matmul.use, matmul.reads) in sites and matmul.value in whole:
            found.setdefault(matmul.value, set()).add(matmul.node)
    return found


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """What else holds parts: `one` is the first part that each turns with, `pinned` cannot turn."""

    one: Mapping[int, int]
    pinned: frozenset[int]

    @staticmethod
    def of(program: Program, parts: Parts, *, stored: bool, keep_tied: bool) -> _Bound:
        one = {i: i for i in range(len(parts.parts))}
        held = {i for i, part in enumerate(parts.parts) if part.pins}
        paths, sources = Counter(o.path for o in program.owners.values()), _sources(program)
        places: dict[tuple[object, ...], list[int]] = {}
        for i, part in enumerate(parts.parts):
            for site in part.sites:
                source, owner = program.weights[site.use].source, program.owners.get(site.use)
                if keep_tied and source is not None and sources[source] > 1:
                    held.add(i)
                if stored and owner is not None:
                    places.setdefault((owner.path, site.axis, site.block), []).append(i)
        for (path, *_), found in places.items():
            if len(found) != paths[str(path)]:
                held.update(found)
            for other in found[1:]:
                old, new = one[other], one[found[0]]
                one = {i: new if first == old else first for i, first in one.items()}
        return _Bound(one, frozenset(one[i] for i in held))


def _sources(program: Program) -> Counter[str | None]:
    return Counter(weight.source for weight in program.weights.values())


def _pair(
    program: Program,
    parts: Parts,
    wanted: Mapping[str, set[str]],
    transform: Transform,
    bound: _Bound,
) -> tuple[int, Paired] | None:
    """The cheapest pairs for a region, and their cost; None where products do as well alone."""
    width, one = parts.region.width, bound.one
    plain = replace(transform, lifted=False)
    if ROTATIONS[transform.rotation].supports(width) is not None or plain.fast() is None:
        return None
    forks = [
        replace(fork, made=one[fork.made], readers=tuple(one[reader] for reader in fork.readers))
        for fork in _forks(program, parts, lifted=transform.lifted)
    ]
    every, able = _inputs(parts, wanted, bound), set[int]()
    alone = 0
    for value, inputs in every.items():
        held = {part for node, part in inputs if _holds(program, value, node)}
        able |= held
        alone += work(program, value, width) if held else 0
    # what no transform can stand in front of, as experts, is reached too where that costs nothing
    all_inputs = able | {
        one[i]
        for i, part in enumerate(parts.parts)
        if any(site.role is Role.READS for site in part.sites) and one[i] not in bound.pinned
    }
    found = cheapest(forks, all_inputs, bound.pinned)
    cost = None if found is None else total(forks, found)
    if cost is None or cost > alone or (cost == alone and able == all_inputs):
        found = cheapest(forks, able, bound.pinned)
        cost = None if found is None else total(forks, found)
        if cost is None or cost >= alone:
            return None
    assert found is not None
    turned = frozenset(i for i, first in one.items() if first in found)
    made, pin = _placement(program, parts, turned), parts.region.pins[0]
    count = f"{made.transforms} instead of {len(wanted)} transforms run"
    why = f"{count}, as the region is held in places: {pin.why} ({pin.where})"
    names = tuple(dict.fromkeys(name for i in sorted(turned) for name in parts.parts[i].names))
    return cost, Paired(parts.region.name, transform, names, why)


def _inputs(
    parts: Parts, wanted: Mapping[str, set[str]], bound: _Bound
) -> dict[str, list[tuple[str, int]]]:
    """The products that are to read a turned value, and their parts, by that value."""
    found: dict[str, list[tuple[str, int]]] = {}
    for value in parts.values:
        for node, part in value.readers:
            first = bound.one[part]
            if node in wanted.get(value.name, ()) and first not in bound.pinned:
                found.setdefault(value.name, []).append((node, first))
    return found


def _holds(program: Program, value: str, reader: str) -> bool:
    """Whether a transform can stand in front of a product."""
    return program.seams is None or (value, reader, False) in program.seams


def _staying(program: Program, parts: Parts, *, lifted: bool) -> set[int]:
    """The parts that cannot turn: pinned ones, and what they make where no transform can stand."""
    found = {i for i, part in enumerate(parts.parts) if part.pins}
    while True:
        more = {
            part
            for value in parts.values
            if value.made in found and not _turns_whole(program, value)
            for reader, part in value.readers
            if lifted or not _holds(program, value.name, reader)
        }
        if more <= found:
            return found
        found |= more


def _turns_whole(program: Program, value: Value) -> bool:
    """Whether what makes a value can turn it for all that read it."""
    return program.seams is None or (value.name, "", False) in program.seams


def _forks(program: Program, parts: Parts, *, lifted: bool) -> list[Fork]:
    """What each value costs, and what cannot be where the program has few seams."""
    forks: list[Fork] = []
    staying = _staying(program, parts, lifted=lifted) if program.seams is not None else set[int]()
    for value in parts.values:
        cost = work(program, value.name, parts.region.width, lifted=lifted)
        forks.append(Fork(value.made, tuple(part for _, part in value.readers), cost, cost))
        if program.seams is None:
            continue
        made = value.made in staying and _turns_whole(program, value)
        for reader, part in value.readers:
            # layers have the fast form of a transform in front of their product, and no lift
            alone = not lifted and _holds(program, value.name, reader)
            back = (value.name, reader, True) in program.seams
            turn = 0 if alone or made else None
            forks.append(Fork(value.made, (part,), turn, 0 if back else None))
            if made and not alone:
                # what makes a value can turn it for all that read it, and for no less
                others = (other for _, other in value.readers if other != part)
                forks += [Fork(other, (part,), None, 0) for other in others]
    return forks


def work(program: Program, value: str, width: int, *, lifted: bool = False) -> int:
    """What a transform of a value costs: for each of its rows, about `n log n` additions."""
    rows = 1
    for size in read.shape(program.node(value))[:-1]:
        rows *= read.hint(size)
    return rows * width * ((width - 1).bit_length() + _LIFTED * lifted)


def _placement(program: Program, parts: Parts, turned: frozenset[int]) -> Placement:
    forward: dict[str, tuple[str, ...]] = {}
    back: dict[str, tuple[str, ...]] = {}
    for value in parts.values:
        made = value.made in turned
        others = tuple(name for name, part in value.readers if (part in turned) is not made)
        if others:
            (back if made else forward)[value.name] = others
    whole = frozenset(
        value.name
        for value in parts.values
        if program.seams is not None
        and len(forward.get(value.name, ())) == len(value.readers)
        and _turns_whole(program, value)
    )
    return Placement(parts, turned, forward, back, whole)
