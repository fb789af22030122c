"""How values differ from what they were before the passes, and how to go back and forth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

from torch import Tensor

from qpass.errors import Unsupported
from qpass.ir import Block, ChangeBasis
from qpass.plan.plan import read_transform, transform_table
from qpass.rotations import Element, Kronecker, Transform


@final
@dataclass(frozen=True, slots=True)
class Change:
    """How a value differs from what it was: `x -> ((x - bias) / gain) R`.

    Gain and bias lie along the last axis, a basis along any, counted from the last. `gain` and
    `bias` are paths of buffers. `unclear` says why nobody can tell the difference.
    """

    bases: tuple[ChangeBasis, ...] = ()
    gain: str | None = None
    bias: str | None = None
    unclear: str | None = None

    @property
    def inner(self) -> tuple[tuple[int, int], ...]:
        """The axes other than the last whose basis changed, and their lengths."""
        return tuple((step.axis, step.block.width) for step in self.bases if step.axis != -1)

    def undo(self, value: Tensor, buffer: Callable[[str], Tensor]) -> Tensor:
        """What the value was, in its own type; `buffer` finds one by path."""
        if value.numel() == 0:
            return value
        wide = value.double()
        for step in reversed(self.bases):
            wide = dataclasses.replace(step, inverse=not step.inverse).apply(wide, {})
        if self.gain is not None:
            wide = wide * buffer(self.gain).double()
        if self.bias is not None:
            wide = wide + buffer(self.bias).double()
        return wide.to(value.dtype)

    def redo(self, value: Tensor, buffer: Callable[[str], Tensor]) -> Tensor:
        """What the value has become, in its own type; `buffer` finds one by path."""
        if value.numel() == 0:
            return value
        wide = value.double()
        if self.bias is not None:
            wide = wide - buffer(self.bias).double()
        if self.gain is not None:
            gain = buffer(self.gain).double()
            if not bool((gain != 0).all()):
                raise Unsupported(
                    f"{self.gain}: is zero somewhere, so the values behind it cannot be replaced\n"
                    "  change values in front of that norm"
                )
            wide = wide / gain
        for step in self.bases:
            wide = step.apply(wide, {})
        return wide.to(value.dtype)


SAME = Change()
DIFFER = Change(unclear="tensors of this shape differ in what happened to them")


@final
@dataclass(frozen=True, slots=True)
class Carried:
    """Tensors with `dims` axes, the last of `size` entries (None: any number), and their change.

    There are `count` of them.
    """

    dims: int
    size: int | None
    change: Change
    count: int = 1


# of a door through which nothing passes that has changed, whatever its shape
OPEN = Carried(-1, None, SAME)


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

    def find(self, tensor: Tensor, *, leaving: bool, any_rank: bool) -> Change | None:
        """What happened to a tensor, by its shape; None for one that the graph does not have.

        With `any_rank`, the width alone may decide.
        """
        dims, width = _kind(tensor)
        side = self.outs if leaving else self.ins
        if OPEN in side:
            return SAME
        for size in (width, None):
            for c in side:
                if (c.dims, c.size) == (dims, size):
                    return c.change
        wide = {c.change for c in side if c.size == width} if any_rank else set[Change]()
        return wide.pop() if len(wide) == 1 else None

    def wide(self, tensor: Tensor, *, leaving: bool) -> bool:
        """Whether something as wide as a tensor, of any rank, has changed here."""
        side = self.outs if leaving else self.ins
        dims, width = _kind(tensor)
        return any(
            c.change != SAME and (c.size == width or (c.size is None and c.dims == dims))
            for c in side
        )

    def count(self, dims: int, width: int) -> int:
        """How many tensors of a shape leave in the graph."""
        return sum(c.count for c in self.outs if (c.dims, c.size) == (dims, width))


def merged(doors: Sequence[Door]) -> Door | None:
    """What is known of a module that has several names; None if nothing is."""
    if len(doors) < 2:
        return doors[0] if doors else None

    def side(all_carried: Iterable[Carried]) -> tuple[Carried, ...]:
        kinds: dict[tuple[int, int | None], Carried] = {}
        for c in all_carried:
            known = kinds.setdefault((c.dims, c.size), c)
            change = c.change if c.change == known.change else DIFFER
            kinds[c.dims, c.size] = Carried(c.dims, c.size, change, max(c.count, known.count))
        return tuple(kinds.values())

    ins = [c for door in doors for c in door.ins]
    outs = [c for door in doors for c in door.outs]
    return Door(doors[0].module, side(ins), side(outs))


def _kind(tensor: Tensor) -> tuple[int, int]:
    return tensor.dim(), tensor.shape[-1] if tensor.dim() else 1


def write_doors(doors: Iterable[Door]) -> dict[str, object]:
    """A table that `read_doors` takes back; equal changes are written once.

    What a door carries is `dims:size:change:count`, with `*` for any size.
    """
    changes: dict[Change, int] = {}

    def side(carried: Iterable[Carried]) -> str:
        found: list[str] = []
        for c in carried:
            at = changes.setdefault(c.change, len(changes))
            found.append(f"{c.dims}:{'*' if c.size is None else c.size}:{at}:{c.count}")
        return " ".join(found)

    rows = {door.module: [side(door.ins), side(door.outs)] for door in doors}
    return {"doors": rows, "changes": [_change_table(change) for change in changes]}


def read_doors(table: Mapping[str, object]) -> tuple[Door, ...]:
    """The doors that `write_doors` made a table of."""
    changes = [_read_change(change) for change in cast("list[dict[str, Any]]", table["changes"])]

    def side(text: str) -> tuple[Carried, ...]:
        found: list[Carried] = []
        for entry in text.split():
            dims, size, at, count = entry.split(":")
            width = None if size == "*" else int(size)
            found.append(Carried(int(dims), width, changes[int(at)], int(count)))
        return tuple(found)

    rows = cast("dict[str, tuple[str, str]]", table["doors"])
    return tuple(Door(path, side(rows[path][0]), side(rows[path][1])) for path in sorted(rows))


def _change_table(change: Change) -> dict[str, object]:
    bases = [
        {
            "basis": transform_table(_transform(step)),
            "axis": step.axis,
            "block": dataclasses.asdict(step.block),
            "inverse": step.inverse,
        }
        for step in change.bases
    ]
    rest = {"gain": change.gain, "bias": change.bias, "unclear": change.unclear}
    return {"bases": bases, **rest}


def _transform(step: ChangeBasis) -> Transform | Element | Kronecker:
    assert isinstance(step.basis, Transform | Element | Kronecker)
    return step.basis


def _read_change(table: Mapping[str, Any]) -> Change:
    bases = tuple(_read_basis(step) for step in table["bases"])
    return Change(bases, table["gain"], table["bias"], table["unclear"])


def _read_basis(step: Mapping[str, Any]) -> ChangeBasis:
    block = step["block"]
    sizes, strides = tuple(block["sizes"]), tuple(block["strides"])
    place = Block(block["offset"], sizes, strides, block["head"])
    return ChangeBasis(read_transform(step["basis"]), step["axis"], place, step["inverse"])
