"""Which values that enter or leave a module are not what they were before the passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import final

import torch
from torch import fx

from qpass.analyze import MOVES, Matmul, Region, Role, by_name, find_matmuls, find_regions
from qpass.ir import Add, Block, ChangeBasis, Ones, Owner, Program, ScaleAxis, Weight, Zeros, read
from qpass.plan import Changed, Paired
from qpass.rotations import Element, Group, Transform
from qpass.targets.changes import DIFFER, OPEN, SAME, Carried, Change, Door
from qpass.transform.fold_scales import Scale, find_scale
from qpass.transform.insert_pairs import find_placements

aten = torch.ops.aten

# the same rows, if the last axis is as long as before
_ROWS = (aten.reshape.default, aten.view.default, aten.to.dtype, aten.contiguous.default)

_MOVED = Change(unclear="the gain of a norm moved through it")
_SCALED = Change(unclear="the gain behind it moved into it")
_GIVEN = Change(unclear="it is scaled, permuted or mixed by numbers of the plan")
_INNER = Change(unclear="its basis changed on a part of an inner axis")


def folded_name(owner: Owner, generation: int) -> str:
    """The buffer that keeps what `owner` was before the `generation`-th time a model changed."""
    return f"folded_{owner.attribute}_{generation}"


def is_folded(before: Weight, after: Weight | None) -> bool:
    """Whether a gain became ones or a bias zeros, to which numbers may have been added since."""
    if after is None or after == before or after.source is not None:
        return False
    steps = [step for step in after.steps if not isinstance(step, Add)]
    return isinstance(steps[-1], Ones | Zeros)


def find_doors(
    before: Program,
    after: Program,
    *,
    generation: int,
    paired: Iterable[Paired] = (),
    changed: Iterable[Changed] = (),
) -> tuple[Door, ...]:
    """The doors of every module that computes something, by path; the root's path is empty."""
    changes = find_changes(before, after, generation=generation, paired=paired, changed=changed)
    inside: dict[str, set[fx.Node]] = {}
    for node in before.graph.nodes:
        if node.op == "call_function":
            for path in {"", *read.module_stack(node)}:
                inside.setdefault(path, set()).add(node)
    # what runs outside of a graph of parts sees nothing that has changed
    doors = [Door(path, (OPEN,), (OPEN,)) for path in before.elsewhere]
    for path in before.elsewhere:
        inside.pop(path, None)
    for path, held in inside.items():
        given = dict.fromkeys(n for node in held for n in node.all_input_nodes if n not in held)
        ins = (n for n in given if before.weight(n) is None and read.is_floating(n))
        outs = (n for n in held if read.is_floating(n) and any(u not in held for u in n.users))
        doors.append(Door(path, _carried(ins, changes), _carried(outs, changes)))
    return tuple(sorted(doors, key=lambda door: door.module))


def find_changes(
    before: Program,
    after: Program,
    *,
    generation: int,
    paired: Iterable[Paired] = (),
    changed: Iterable[Changed] = (),
) -> dict[str, Change]:
    """The change of each value of `after` that is not what it was, by name.

    `paired` are the regions of which a part turned, `changed` those that did more than turn.
    """
    lost: dict[str, str] = {}
    for use, owner in before.owners.items():
        if is_folded(before.weights[use], after.weights.get(use)):
            name = folded_name(owner, generation)
            lost[use] = f"{owner.module}.{name}" if owner.module else name
    changes = _Changes(before)
    for scale in _folded_back(before, after, lost):
        del lost[scale.gain.name]
        changes.found |= dict.fromkeys(scale.values, _SCALED)
    changes.scale(lost)
    # regions were chosen when norms had been folded and before transforms were inserted
    folded = before.clone()
    folded.weights = {use: after.weights.get(use, weight) for use, weight in before.weights.items()}
    given = tuple(changed)
    changes.turn(folded, {choice.element for choice in given})
    for choice in paired:
        changes.turn_parts(folded, choice)
    for group in dict.fromkeys(choice.group for choice in given):
        regions = by_name(find_regions(folded, group))
        named = [regions[c.region] for c in given if c.group is group]
        changes.found |= {span.value: _GIVEN for region in named for span in region.spans}
    return changes.found


def _folded_back(before: Program, after: Program, lost: Mapping[str, str]) -> list[Scale]:
    """The lost gains that went into the weights in front of them, not into those behind."""
    found: list[Scale] = []
    matmuls = {m.node: m for m in find_matmuls(before)}
    for use in lost:
        for node in before.node(use).users:
            scale = find_scale(before, node, matmuls)
            if scale is None:
                continue
            step = ScaleAxis(before.weights[use], scale.matmul.writes)
            if step in after.weights[scale.matmul.use].steps:
                found.append(scale)
    return found


def _carried(values: Iterable[fx.Node], changes: Mapping[str, Change]) -> tuple[Carried, ...]:
    """One entry for each kind of tensor among `values`, by shape, open sizes last."""
    kinds: dict[tuple[int, int | None], list[Change]] = {}
    for node in values:
        shape = read.shape(node)
        size = shape[-1] if shape else 1
        change = changes.get(node.name, SAME)
        # what changed on another axis, as images do, may have rows of any length
        width = size if isinstance(size, int) and not change.inner else None
        kinds.setdefault((len(shape), width), []).append(change)
    found = [
        Carried(dims, size, held[0] if len(set(held)) == 1 else DIFFER, len(held))
        for (dims, size), held in kinds.items()
    ]
    return tuple(sorted(found, key=lambda c: (c.dims, c.size is None, c.size or 0)))


@final
class _Changes:
    """Reads off the weights which regions were scaled and turned, and so which values."""

    def __init__(self, before: Program) -> None:
        self.found: dict[str, Change] = {}
        self._before = before
        self._nodes = {node.name: node for node in before.graph.nodes}
        self._makers: dict[str, Matmul] = {}
        self._readers: dict[str, list[Matmul]] = {}
        for matmul in find_matmuls(before):
            self._makers[matmul.node] = matmul
            self._readers.setdefault(matmul.value, []).append(matmul)

    def scale(self, lost: Mapping[str, str]) -> None:
        """Record which values lost a gain or a bias to their readers: a path for each lost use."""
        kept: dict[str, dict[bool, str]] = {}
        for use, path in lost.items():
            for norm in self._nodes[use].users:
                kept.setdefault(norm.name, {})[_is_bias(norm, use)] = path
        for region in find_regions(self._before, Group.DIAGONAL) if kept else ():
            uses = {site.use for site in region.sites} & lost.keys()
            norms = {norm for use in uses for norm in self._nodes[use].users}
            for norm in norms:
                had = kept[norm.name]
                moved = _moved(norm)
                for span in region.spans:
                    # a bias is added once, so it can be restored only where nothing came after it
                    clear = len(norms) == 1 and (True not in had or span.value in moved)
                    self.found[span.value] = (
                        Change(gain=had.get(False), bias=had.get(True))
                        if clear and self._whole(span.value, span.axis, region)
                        else _MOVED
                    )

    def turn(self, folded: Program, given: Collection[Element]) -> None:
        """Record which values are in another basis, by the weights that write them.

        Weights have absorbed the elements `given`, too.
        """
        for group in (Group.ORTHOGONAL, Group.ORTHOGONAL_ONES):
            for region in find_regions(folded, group):
                basis = _basis(folded, region, given) if region.free else None
                if basis is not None:
                    for span in region.spans:
                        self._turn(span.value, span.axis, region, basis)

    def turn_parts(self, folded: Program, choice: Paired) -> None:
        """Record which values of a region that turns in part are in another basis."""
        for placement in find_placements(folded, choice):
            if isinstance(placement, str):
                continue
            whole = placement.parts.region
            for i in placement.turned:
                part = placement.parts.parts[i]
                region = dataclasses.replace(
                    whole, heads=1, sites=part.sites, spans=part.spans, pins=()
                )
                for span in part.spans:
                    self._turn(span.value, span.axis, region, choice.transform)
            region = dataclasses.replace(whole, heads=1, sites=(), spans=(), pins=())
            for name in placement.whole:
                axis = len(read.shape(self._nodes[name])) - 1
                self._turn(name, axis, region, choice.transform)

    def _turn(self, value: str, axis: int, region: Region, basis: Transform | Element) -> None:
        known = self.found.get(value, SAME)
        if known.unclear is not None:
            return
        blocks = self._blocks(value, axis, region)
        last = len(read.shape(self._nodes[value]))
        steps = [ChangeBasis(basis, axis - last, block) for block in blocks]
        new = [step for step in steps if step not in known.bases]
        bases = (*known.bases, *new)
        self.found[value] = dataclasses.replace(known, bases=bases) if blocks else _INNER

    def _blocks(self, value: str, axis: int, region: Region) -> tuple[Block, ...]:
        """Which entries of an axis of a value are coordinates of the region."""
        shape = read.shape(self._nodes[value])
        if region.heads == 1 and shape[axis] == region.width:
            return (Block.whole(region.width),)
        if axis != len(shape) - 1:
            return ()
        sites: dict[tuple[str, int], list[Block]] = {}
        for site in region.sites:
            sites.setdefault((site.use, site.axis), []).append(site.block)
        for name in self._alike(value):
            made = self._makers.get(name)
            if made is not None and (made.use, made.writes) in sites:
                return tuple(sites[made.use, made.writes])
            for reader in self._readers.get(name, []):
                if (reader.use, reader.reads) in sites:
                    return tuple(sites[reader.use, reader.reads])
        return ()

    def _alike(self, value: str) -> list[str]:
        """A value, and those around it whose rows hold the same entries."""
        found = [value]
        for name in found:
            node = self._nodes[name]
            near = list(node.all_input_nodes) if read.calls(node, *_ROWS) else []
            near += [user for user in node.users if read.calls(user, *_ROWS)]
            width = read.shape(node)[-1]
            found += [
                other.name
                for other in near
                if other.name not in found
                and read.is_floating(other)
                and read.same_size(read.shape(other)[-1], width)
            ]
        return found

    def _whole(self, value: str, axis: int, region: Region) -> bool:
        """Whether the region is the last axis of a value, all of it."""
        shape = read.shape(self._nodes[value])
        return axis == len(shape) - 1 and shape[-1] == region.width


def _basis(
    folded: Program, region: Region, given: Collection[Element]
) -> Transform | Element | None:
    """What the weights which write a region have turned by, apart from `given`, or None."""
    found: set[Transform | Element] = set()
    for site in region.sites:
        # what a reader absorbed may be the inverse of a transform that runs with the model
        for step in folded.weights[site.use].steps if site.role is Role.WRITES else ():
            if isinstance(step, ChangeBasis) and (step.axis, step.block) == (site.axis, site.block):
                assert isinstance(step.basis, Transform | Element)
                found.add(step.basis)
    found -= set(given)
    assert len(found) <= 1, f"{region.name}: is written in {len(found)} bases"
    return found.pop() if found else None


def _moved(norm: fx.Node) -> set[str]:
    """A norm and the values that hold entries of its output and nothing else."""
    found, pending = {norm.name}, [norm]
    while pending:
        moved = [user for user in pending.pop().users if read.calls(user, *MOVES)]
        found |= {node.name for node in moved}
        pending += moved
    return found


def _is_bias(norm: fx.Node, use: str) -> bool:
    if not read.calls(norm, aten.layer_norm.default):
        return False
    bias = read.optional_value(norm, "bias")
    return bias is not None and bias.name == use
