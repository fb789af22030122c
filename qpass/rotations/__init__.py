"""Orthogonal basis changes by name, and the groups they belong to."""

from qpass.rotations.base import ROTATIONS, Fast, Key, Rotation
from qpass.rotations.group import Group
from qpass.rotations.transform import Transform

__all__ = ["ROTATIONS", "Fast", "Group", "Key", "Rotation", "Transform"]
