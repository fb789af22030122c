"""What does it mean that an atom changes basis: which entries of a tensor change, and how?

Written apart from `qpass.ir.Block` and `qpass.transform`, so as to judge them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.analyze.atoms import Atom, Axis, Placement, Power, placements
from qpass.rotations import Group, Key, sample


@dataclass(frozen=True, eq=False)
class Change:
    """One matrix for `leaf`, or one for each entry of `head`."""

    leaf: Atom
    head: Atom | None
    matrices: Tensor  # [heads, n, n]

    def apply(self, value: Tensor, layout: tuple[Axis, ...], *, undo: bool = False) -> Tensor:
        """The tensor in the new basis: every place of the leaf, on every axis."""
        for i, axis in enumerate(layout):
            for place in placements(axis):
                if place.leaf.atom is self.leaf:
                    value = self._at(value, layout, i, place, undo=undo)
        return value

    def _at(
        self, value: Tensor, layout: tuple[Axis, ...], i: int, place: Placement, *, undo: bool
    ) -> Tensor:
        matrices = raised(self.matrices, place.leaf.power)
        if undo:
            matrices = torch.linalg.inv(matrices)
        moved = value.movedim(i, -1).clone()
        for start, heads in _starts(place, self.head):
            at = start + torch.arange(matrices.shape[-1]) * place.stride
            if heads is None:
                picks = self._picks(layout, i)
                rows = moved[..., at]
                changed = rows @ matrices[0]
                if picks is not None:
                    axis, index = picks
                    axis -= axis > i
                    changed = torch.empty_like(rows)
                    for entry, h in enumerate(index):
                        row = rows.select(axis, entry)
                        changed.select(axis, entry).copy_(row @ matrices[h])
                moved[..., at] = changed
            else:
                moved[..., at] = moved[..., at] @ matrices[heads]
        return moved.movedim(-1, i)

    def _picks(self, layout: tuple[Axis, ...], i: int) -> tuple[int, list[int]] | None:
        """The other axis that picks the matrix, and which one for each of its entries."""
        if self.head is None:
            return None
        for j, axis in enumerate(layout):
            for place in placements(axis):
                if j != i and place.leaf.atom is self.head:
                    total = 1
                    for _, size, _ in (*place.around, (None, self.head.size, None)):
                        total *= size
                    return j, [(e // place.stride) % self.head.size for e in range(total)]
        raise AssertionError("a leaf without the factor that picks its matrix")


def _starts(place: Placement, head: Atom | None) -> list[tuple[int, int | None]]:
    """Where each repetition of the leaf begins on its axis, and its entry of `head` there."""
    starts: list[tuple[int, int | None]] = [(place.offset, None)]
    for atom, size, stride in place.around:
        starts = [
            (at + k * stride, k if atom is head else h) for at, h in starts for k in range(size)
        ]
    return starts


def raised(matrices: Tensor, power: Power) -> Tensor:
    """A power of each matrix, where -1 is its inverse transpose; NaN where it is not real."""
    if power == 1:
        return matrices
    if power == -1:
        return torch.linalg.inv(matrices).mT
    if power == int(power):
        return torch.linalg.matrix_power(matrices, int(power))
    entries = matrices.diagonal(dim1=-2, dim2=-1)
    diagonal = torch.equal(torch.diag_embed(entries), matrices)
    return torch.diag_embed(entries ** float(power) if diagonal else entries * torch.nan)


def element(group: Group, leaf: Atom, head: Atom | None, seed: int) -> Change:
    """A random change of `leaf` within `group`."""
    return Change(leaf, head, matrices(group, leaf.size, 1 if head is None else head.size, seed))


@functools.lru_cache(maxsize=4096)
def matrices(group: Group, width: int, heads: int, seed: int) -> Tensor:
    """A random element of `group` for each head, `[heads, width, width]`."""
    return torch.stack([sample(group, width, Key(f"head {h}", seed)) for h in range(heads)])
