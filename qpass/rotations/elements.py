"""What a random element of a group looks like, and whether a matrix is one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.rotations.base import Key
from qpass.rotations.counter import permutation, signs, uniforms
from qpass.rotations.group import Group
from qpass.rotations.haar import Haar
from qpass.rotations.lift import lift

# how far, relative to its largest entry, a float64 product of a few matrices may be from exact
MEMBERSHIP_LIMIT = 1e-10

_PLANES = frozenset({Group.PLANE_ROTATIONS, Group.PLANE_SCALES, Group.ROPE_PLANES})


def sample(group: Group, n: int, key: Key) -> Tensor:
    """A well-conditioned random `[n, n]` element of `group` in float64.

    A rotary plane pairs coordinate i with i + n/2, so those groups want an even n.
    """
    if n < 1 or (group in _PLANES and n % 2):
        raise BadInput(f"{group.value}: width {n} has no such matrix; planes want an even width")
    return _SAMPLES[group](n, key)


def contains(group: Group, matrix: Tensor) -> bool:
    """Whether `matrix` `[n, n]` lies in `group` to `MEMBERSHIP_LIMIT`."""
    return matrix.isfinite().all().item() is True and _CONTAINS[group](matrix)


def _positive(n: int, key: Key) -> Tensor:
    # away from zero, so that inverses lose no digits
    return 0.5 + 1.5 * uniforms(key, n)


def _haar(n: int, key: Key) -> Tensor:
    return Haar().matrix(n, key)


def _turns(n: int, key: Key) -> Tensor:
    angle = 2 * math.pi * uniforms(key, n // 2)
    return _planes(angle.cos(), angle.sin())


def _planes(cos: Tensor, sin: Tensor) -> Tensor:
    """`[[c, s], [-s, c]]` in each plane (i, i + n/2)."""
    C, S = torch.diag(cos), torch.diag(sin)
    return torch.cat([torch.cat([C, S], 1), torch.cat([-S, C], 1)])


def _general(n: int, key: Key) -> Tensor:
    left, right = Key(f"{key.name}/left", key.seed), Key(f"{key.name}/right", key.seed)
    return _haar(n, left) * _positive(n, key) @ _haar(n, right)


_SAMPLES: dict[Group, Callable[[int, Key], Tensor]] = {
    Group.IDENTITY: lambda n, key: torch.eye(n, dtype=torch.float64),
    Group.PERMUTATION: lambda n, key: torch.eye(n, dtype=torch.float64)[permutation(key, n)],
    Group.SIGNS: lambda n, key: torch.diag(signs(key, n)),
    Group.POSITIVE_DIAGONAL: lambda n, key: torch.diag(_positive(n, key)),
    Group.DIAGONAL: lambda n, key: torch.diag(_positive(n, key) * signs(key, n)),
    Group.PLANE_ROTATIONS: _turns,
    Group.PLANE_SCALES: lambda n, key: torch.diag(_positive(n // 2, key).repeat(2)),
    Group.ROPE_PLANES: lambda n, key: _turns(n, key) * _positive(n // 2, key).repeat(2),
    Group.ORTHOGONAL_ONES: lambda n, key: lift(_haar(n, key)),
    Group.ORTHOGONAL: _haar,
    Group.GENERAL: _general,
}


def _zero(x: Tensor, scale: Tensor) -> bool:
    return bool((x.abs() <= MEMBERSHIP_LIMIT * scale.abs().max()).all())


def _is_diagonal(M: Tensor) -> bool:
    return _zero(M - torch.diag(M.diagonal()), M) and _is_general(M)


def _is_positive_diagonal(M: Tensor) -> bool:
    return _is_diagonal(M) and bool((M.diagonal() > 0).all())


def _is_orthogonal(M: Tensor) -> bool:
    eye = torch.eye(len(M), dtype=M.dtype)
    return _zero(M @ M.T - eye, eye)


def _is_ones(M: Tensor) -> bool:
    return _is_orthogonal(M) and _zero(M.sum(0) - 1, M)


def _is_signs(M: Tensor) -> bool:
    return _is_diagonal(M) and _is_orthogonal(M)


def _is_permutation(M: Tensor) -> bool:
    # a non-negative orthogonal matrix is a permutation
    return _is_orthogonal(M) and bool((M >= -MEMBERSHIP_LIMIT).all())


def _is_rope(M: Tensor) -> bool:
    if len(M) % 2:
        return False
    half = len(M) // 2
    planes = _planes(M[:half, :half].diagonal(), M[:half, half:].diagonal())
    return _zero(M - planes, M) and _is_general(M)


def _is_general(M: Tensor) -> bool:
    return bool(torch.linalg.cond(M) < 1 / MEMBERSHIP_LIMIT)


_CONTAINS: dict[Group, Callable[[Tensor], bool]] = {
    Group.IDENTITY: lambda M: _zero(M - torch.eye(len(M), dtype=M.dtype), M),
    Group.PERMUTATION: _is_permutation,
    Group.SIGNS: _is_signs,
    Group.POSITIVE_DIAGONAL: _is_positive_diagonal,
    Group.DIAGONAL: _is_diagonal,
    Group.PLANE_ROTATIONS: lambda M: _is_rope(M) and _is_orthogonal(M),
    Group.PLANE_SCALES: lambda M: _is_rope(M) and _is_positive_diagonal(M),
    Group.ROPE_PLANES: _is_rope,
    Group.ORTHOGONAL_ONES: _is_ones,
    Group.ORTHOGONAL: _is_orthogonal,
    Group.GENERAL: _is_general,
}
