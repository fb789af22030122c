"""Calls of products of 4-bit integers: odd shapes, and ones that only kernels for bytes serve."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.kernels.cases import KINDS, random_packed
from tests.kernels.gpu.case import FLOATS, Case, random

# (leading axes of x, out features, groups, columns of a group)
SHAPES = (
    ((1,), 17, 3, 8),
    ((5,), 40, 2, 32),
    ((3, 2), 16, 1, 100),
    ((17,), 50, 4, 9),
    ((33,), 20, 3, 16),
    ((70,), 130, 1, 264),
    ((66,), 80, 2, 128),
    ((2, 1, 2), 1, 1, 1),
)


def cases() -> Iterator[Case]:
    """Calls that some kernel serves: the last kinds have 4 bits, and no offsets but for one."""
    for i, (lead, n, groups, width) in enumerate(SHAPES):
        for j, kind in enumerate(KINDS[3:]):
            k, dtype = groups * width, FLOATS[(i + j) % 3]
            name = f"fours-{lead}-{n}x{groups}x{width}-{kind}-{dtype}"
            g = random(name)
            held = random_packed(n, k, groups, kind, g)
            bias = torch.randn(n, generator=g).to(dtype) if (i + j) % 2 else None
            rest = (
                held.weight, held.row_scales, held.group_scales, held.group_offsets, bias,
                held.bits, k, n,
            )  # fmt: skip
            codes = torch.randint(-8, 8, (*lead, k), generator=g, dtype=torch.int8)
            scales = torch.rand((*lead, 1), generator=g) / (8 * k)
            yield Case(name, "linear_fours", (codes, scales, *rest, dtype))
    g = random("strided fours")
    held = random_packed(24, 24, 3, (4, True, False), g)
    rest = (held.weight, held.row_scales, held.group_scales, None, None, 4, 24, 24)
    codes = torch.randint(-8, 8, (7, 48), generator=g, dtype=torch.int8)
    given = (codes[:, ::2], torch.rand(7, 1, generator=g), *rest, torch.float32)
    yield Case("fours-columns-apart", "linear_fours", given)


def refusals() -> Iterator[Case]:
    """Calls that no kernel may serve."""
    held = random_packed(17, 24, 3, (4, True, False), random("refused fours"))
    rest = (held.weight, held.row_scales, held.group_scales, None, None, 4, 24, 17)
    codes, scales = torch.zeros(2, 24, dtype=torch.int16), torch.ones(2, 1)
    yield Case("fours-short", "linear_fours", (codes, scales, *rest, torch.float32))
