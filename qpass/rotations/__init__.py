"""Orthogonal basis changes by name, and the groups they belong to."""

from qpass.rotations.apply import apply, transform_blocks
from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation
from qpass.rotations.elements import contains, sample
from qpass.rotations.group import Group
from qpass.rotations.kronecker import Kronecker
from qpass.rotations.lift import lift
from qpass.rotations.numbers import Element
from qpass.rotations.transform import Transform

__all__ = [
    "ROTATIONS",
    "Element",
    "Fast",
    "Group",
    "Key",
    "Kronecker",
    "Rotation",
    "Transform",
    "apply",
    "contains",
    "lift",
    "sample",
    "transform_blocks",
]
