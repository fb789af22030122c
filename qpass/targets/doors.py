"""Which values that enter or leave a module are not what they were before the passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, Region, Role, find_matmuls, find_regions
from qpass.ir import Block, ChangeBasis, Ones, Owner, Program, Weight, Zeros, read
from qpass.rotations import Group, Transform

aten = torch.ops.aten

Lookup = Callable[[str], Tensor]

# the same entries, on the same last axis
_SAME = (aten.reshape.default, aten.to.dtype, aten.alias.default, aten.contiguous.default)


@final
@dataclass(frozen=True, slots=True)
class Change:
    """How a value differs from what it was: `x -> ((x - bias) / gain) R`, on the last axis.

    `gain` and `bias` name buffers of the model. `unclear` says why nobody can tell the difference.
    """

    bases: tuple[ChangeBasis, ...] = ()
    gain: str | None = None
    bias: str | None = None
    unclear: str | None = None

    def undo(self, value: Tensor, tensors: Lookup) -> Tensor:
        """What the value was, in its own type."""
        wide = value.double()
        for step in reversed(self.bases):
            wide = dataclasses.replace(step, inverse=not step.inverse).apply(wide, {})
        if self.gain is not None:
            wide = wide * tensors(self.gain).double()
        if self.bias is not None:
            wide = wide + tensors(self.bias).double()
        return wide.to(value.dtype)

    def redo(self, value: Tensor, tensors: Lookup) -> Tensor:
        """What the value has become, in its own type."""
        wide = value.double()
        if self.bias is not None:
            wide = wide - tensors(self.bias).double()
        if self.gain is not None:
            wide = wide / tensors(self.gain).double()
        for step in self.bases:
            wide = step.apply(wide, {})
        return wide.to(value.dtype)


SAME = Change()
_MOVED = Change(unclear="the gain of a norm moved out of it")


@final
@dataclass(frozen=True, slots=True)
class Carried:
    """Tensors with `dims` axes, the last of `size` entries (None: any number), and their change."""

    dims: int
    size: int | None
    change: Change

    def fits(self, tensor: Tensor) -> bool:
        return tensor.dim() == self.dims and self.size in (None, tensor.shape[-1])


@final
@dataclass(frozen=True, slots=True)
class Door:
    """What the graph says of the tensors that enter and leave the module at a path."""

    module: str
    ins: tuple[Carried, ...]
    outs: tuple[Carried, ...]

    @property
    def changed(self) -> bool:
        return any(carried.change != SAME for carried in (*self.ins, *self.outs))


def folded_name(owner: Owner, generation: int) -> str:
    """The buffer that keeps what `owner` was before the `generation`-th time a model changed."""
    return f"folded_{owner.attribute}_{generation}"


def find_doors(before: Program, after: Program, *, generation: int) -> tuple[Door, ...]:
    """The doors of every module that computes something, by path; the root's path is empty."""
    lost: dict[str, str] = {}
    for use, owner in before.owners.items():
        if is_folded(before.weights[use], after.weights.get(use)):
            name = folded_name(owner, generation)
            lost[use] = f"{owner.module}.{name}" if owner.module else name
    changes = _Changes(after, lost)
    nodes = [n for n in before.graph.nodes if n.op == "call_function" and read.is_floating(n)]
    inside: dict[str, set[fx.Node]] = {}
    for node in before.graph.nodes:
        if node.op == "call_function":
            for path in {"", *read.module_stack(node)}:
                inside.setdefault(path, set()).add(node)
    doors: list[Door] = []
    for path, held in inside.items():
        ins = {n: None for node in held for n in node.all_input_nodes if n not in held}
        outs = [n for n in nodes if n in held and any(u not in held for u in n.users)]
        entering = (n for n in ins if before.weight(n) is None and read.is_floating(n))
        doors.append(Door(path, changes.carried(entering), changes.carried(outs)))
    return tuple(sorted(doors, key=lambda door: door.module))


class _Changes:
    """The change of each value, by name."""

    def __init__(self, after: Program, lost: Mapping[str, str]) -> None:
        self._nodes = {node.name: node for node in after.graph.nodes}
        self._matmuls = find_matmuls(after)
        self._by_node = {m.node: m for m in self._matmuls}
        self._readers: dict[str, list[Matmul]] = {}
        for matmul in self._matmuls:
            self._readers.setdefault(matmul.value, []).append(matmul)
        self._found: dict[str, Change] = {}
        self._scale(after, lost)
        self._rotate(after)

    def carried(self, values: Iterable[fx.Node]) -> tuple[Carried, ...]:
        """One entry for each kind of tensor among `values`."""
        kinds: dict[tuple[int, int | None], Change] = {}
        for node in values:
            shape = read.shape(node)
            size = shape[-1] if shape else 1
            kind = (len(shape), size if isinstance(size, int) else None)
            change = self._found.get(node.name, SAME)
            if kinds.setdefault(kind, change) != change:
                kinds[kind] = Change(
                    unclear="tensors of this shape differ in what happened to them"
                )
        return tuple(Carried(dims, size, change) for (dims, size), change in sorted_kinds(kinds))

    def _scale(self, after: Program, lost: Mapping[str, str]) -> None:
        """Values that lost a gain or a bias to their readers."""
        norms: dict[str, dict[bool, str]] = {}
        for use, path in lost.items():
            for norm in self._nodes[use].users:
                norms.setdefault(norm.name, {})[_is_bias(norm, use)] = path
        if not norms:
            return
        plain = {n.name: name for name in norms for n in _spread(self._nodes[name])}
        for region in find_regions(after, Group.DIAGONAL):
            found = {span.value for span in region.spans} & norms.keys()
            for span in region.spans if found else ():
                node = self._nodes[span.value]
                kept = norms[next(iter(found))]
                whole = span.axis == len(read.shape(node)) - 1 and _size(node) == region.width
                # a bias is added once, so it can be restored only where nothing came after it
                clear = whole and len(found) == 1 and (True not in kept or node.name in plain)
                self._found[span.value] = (
                    Change(gain=kept.get(False), bias=kept.get(True)) if clear else _MOVED
                )
        for value, norm in plain.items():
            kept = norms[norm]
            self._found.setdefault(value, Change(gain=kept.get(False), bias=kept.get(True)))

    def _rotate(self, after: Program) -> None:
        """Values whose basis has changed."""
        done = set[tuple[str, int, Block]]()
        for group in (Group.ORTHOGONAL, Group.ORTHOGONAL_ONES):
            for region in find_regions(after, group):
                places = {(s.use, s.axis, s.block) for s in region.sites}
                basis = None if places & done else _basis(after, region)
                if basis is None:
                    continue
                done |= places
                for span in region.spans:
                    self._turn(span.value, span.axis, region, basis)

    def _turn(self, value: str, axis: int, region: Region, basis: Transform) -> None:
        node = self._nodes[value]
        known = self._found.get(value, SAME)
        block = self._block(node, axis, region)
        if block is None or known.unclear is not None:
            self._found[value] = Change(
                unclear=known.unclear or "its basis changed on an inner axis"
            )
            return
        step = ChangeBasis(basis, -1, block)
        self._found[value] = dataclasses.replace(known, bases=(*known.bases, step))

    def _block(self, node: fx.Node, axis: int, region: Region) -> Block | None:
        """Which entries of a value's last axis are coordinates of the region."""
        if axis != len(read.shape(node)) - 1:
            return None
        if _size(node) == region.width and region.heads == 1:
            return Block.whole(region.width)
        sites = {(s.use, s.axis): s.block for s in region.sites}
        if (made := self._by_node.get(node.name)) is not None:
            return sites.get((made.use, made.writes))
        for reader in self._readers.get(node.name, []):
            if (reader.use, reader.reads) in sites:
                return sites[reader.use, reader.reads]
        return None


def sorted_kinds(
    kinds: Mapping[tuple[int, int | None], Change],
) -> list[tuple[tuple[int, int | None], Change]]:
    """By shape, open sizes last."""
    return sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1] is None, item[0][1] or 0))


def is_folded(before: Weight, after: Weight | None) -> bool:
    """Whether a gain became ones or a bias zeros."""
    return (
        after is not None
        and after != before
        and after.source is None
        and isinstance(after.steps[-1], Ones | Zeros)
    )


def _basis(after: Program, region: Region) -> Transform | None:
    """The transform that all the weights of a region have absorbed, or None."""
    found: set[Transform] = set()
    for site in region.sites:
        steps = after.weights[site.use].steps
        turned = {
            step.basis
            for step in steps
            if isinstance(step, ChangeBasis) and (step.axis, step.block) == (site.axis, site.block)
        }
        bases = {basis for basis in turned if isinstance(basis, Transform)}
        if len(bases) > 1 and site.role is Role.READS:
            # the other one is undone by a transform that runs with the model
            continue
        if not bases:
            return None
        found |= bases
    return found.pop() if len(found) == 1 else None


def _spread(norm: fx.Node) -> set[fx.Node]:
    """A norm and what only reshapes or casts its output."""
    found = {norm}
    pending = [norm]
    while pending:
        for user in pending.pop().users:
            if read.calls(user, *_SAME) and user not in found:
                found.add(user)
                pending.append(user)
    return found


def _is_bias(norm: fx.Node, use: str) -> bool:
    if not read.calls(norm, aten.layer_norm.default):
        return False
    bias = read.optional_value(norm, "bias")
    return bias is not None and bias.name == use


def _size(node: fx.Node) -> object:
    shape = read.shape(node)
    return shape[-1] if shape else 1


def write_doors(doors: Iterable[Door]) -> dict[str, object]:
    """A table that `read_doors` takes back; equal changes are written once."""
    changes: dict[Change, int] = {}

    def side(carried: Iterable[Carried]) -> list[list[int | None]]:
        return [[c.dims, c.size, changes.setdefault(c.change, len(changes))] for c in carried]

    rows = [[door.module, side(door.ins), side(door.outs)] for door in doors]
    return {"doors": rows, "changes": [dataclasses.asdict(change) for change in changes]}


def read_doors(table: Mapping[str, object]) -> tuple[Door, ...]:
    """The doors that `write_doors` made a table of."""
    changes = [_read_change(change) for change in cast("list[dict[str, Any]]", table["changes"])]

    def side(rows: list[tuple[int, int | None, int]]) -> tuple[Carried, ...]:
        return tuple(Carried(dims, size, changes[index]) for dims, size, index in rows)

    rows = cast("list[tuple[str, list[Any], list[Any]]]", table["doors"])
    return tuple(Door(path, side(ins), side(outs)) for path, ins, outs in rows)


def _read_change(table: Mapping[str, Any]) -> Change:
    bases = tuple(_read_basis(step) for step in table["bases"])
    return Change(bases, table["gain"], table["bias"], table["unclear"])


def _read_basis(step: Mapping[str, Any]) -> ChangeBasis:
    block = step["block"]
    sizes, strides = tuple(block["sizes"]), tuple(block["strides"])
    place = Block(block["offset"], sizes, strides, block["head"])
    return ChangeBasis(Transform(**step["basis"]), step["axis"], place, step["inverse"])
