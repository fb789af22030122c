"""Which groups of basis changes exist, and which contains which."""

from __future__ import annotations

import enum


class Group(enum.Enum):
    """A group of invertible n x n matrices; the order is a lattice, not a ladder."""

    IDENTITY = "identity"
    PERMUTATION = "permutations"
    SIGNS = "diagonal signs"
    POSITIVE_DIAGONAL = "positive diagonals"
    DIAGONAL = "invertible diagonals"
    PLANE_ROTATIONS = "a rotation in each rotary plane"
    PLANE_SCALES = "a positive scale for each rotary plane"
    ROPE_PLANES = "a rotation and a scale in each rotary plane"
    ORTHOGONAL_ONES = "orthogonal matrices that fix the all-ones vector"
    ORTHOGONAL = "orthogonal matrices"
    GENERAL = "invertible matrices"

    def __le__(self, other: Group) -> bool:
        """Whether every matrix of `self` is one of `other`."""
        return self is other or any(parent <= other for parent in _PARENTS[self])

    def __lt__(self, other: Group) -> bool:
        return self is not other and self <= other

    def __and__(self, other: Group) -> Group:
        """The largest named group that lies in both."""
        shared = [group for group in Group if group <= self and group <= other]
        return next(group for group in shared if all(less <= group for less in shared))

    @property
    def next_larger(self) -> tuple[Group, ...]:
        """The smallest groups that properly contain this one."""
        return _PARENTS[self]


# the smallest groups that properly contain each one
_PARENTS: dict[Group, tuple[Group, ...]] = {
    Group.IDENTITY: (
        Group.PERMUTATION,
        Group.SIGNS,
        Group.POSITIVE_DIAGONAL,
        Group.PLANE_ROTATIONS,
        Group.PLANE_SCALES,
    ),
    Group.PERMUTATION: (Group.ORTHOGONAL_ONES,),
    Group.SIGNS: (Group.DIAGONAL, Group.ORTHOGONAL),
    Group.POSITIVE_DIAGONAL: (Group.DIAGONAL,),
    Group.DIAGONAL: (Group.GENERAL,),
    Group.PLANE_ROTATIONS: (Group.ROPE_PLANES, Group.ORTHOGONAL),
    Group.PLANE_SCALES: (Group.ROPE_PLANES, Group.POSITIVE_DIAGONAL),
    Group.ROPE_PLANES: (Group.GENERAL,),
    Group.ORTHOGONAL_ONES: (Group.ORTHOGONAL,),
    Group.ORTHOGONAL: (Group.GENERAL,),
    Group.GENERAL: (),
}
