"""Calls of linear layers with a branch of low rank: odd ones, and ones to be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.kernels.cases import KINDS, random_packed
from tests.kernels.gpu.case import FLOATS, Case, random

# (leading axes of x, out features, groups, columns of a group, rank)
SHAPES = (
    ((1,), 17, 3, 8, 1),
    ((5,), 40, 2, 32, 32),
    ((3, 2), 16, 1, 100, 7),
    ((17,), 50, 4, 9, 16),
    ((33,), 20, 3, 16, 20),
    ((70,), 80, 1, 64, 33),
    ((2,), 24, 2, 2048, 5),
    ((4,), 16, 1, 16, 0),
)


def cases() -> Iterator[Case]:
    """Calls that some kernel serves."""
    for i, (lead, n, groups, width, rank) in enumerate(SHAPES):
        for j in (0, 1):
            kind = KINDS[(2 * i + 3 * j) % len(KINDS)]
            k, dtype = groups * width, FLOATS[(i + j) % 3]
            name = f"low-rank-{rank}-{lead}-{n}x{groups}x{width}-{kind}-{dtype}"
            g = random(name)
            held = random_packed(n, k, groups, kind, g)
            bias = torch.randn(n, generator=g).to(dtype) if j else None
            rest = (
                held.weight, held.row_scales, held.group_scales, held.group_offsets, bias,
                held.bits, k, n,
            )  # fmt: skip
            low = torch.randn((*lead, rank), generator=g).to(dtype)
            up = torch.randn((n, rank), generator=g).to(dtype)
            x = (torch.randn((*lead, k), generator=g) / k).to(dtype)
            yield Case(f"real-{name}", "linear.real_low_rank", (x, *rest, low, up))
            codes = torch.randint(-127, 128, (*lead, k), generator=g, dtype=torch.int8)
            scales = torch.rand((*lead, 1), generator=g) / (127 * k)
            given = (codes, scales, *rest, dtype, low, up)
            yield Case(f"codes-{name}", "linear.codes_low_rank", given)


def refusals() -> Iterator[Case]:
    """Branches that no kernel may add."""
    g = random("refused branches")
    held = random_packed(17, 24, 3, (8, True, True), g)
    rest = (
        held.weight, held.row_scales, held.group_scales, held.group_offsets, None, 8, 24, 17,
    )  # fmt: skip
    x, codes = torch.randn(2, 24), torch.zeros(2, 24, dtype=torch.int8)
    low, up = torch.randn(2, 4), torch.randn(17, 4)

    def both(why: str, low: Any, up: Any) -> Iterator[Case]:
        yield Case(f"low-rank-real-{why}", "linear.real_low_rank", (x, *rest, low, up))
        given = (codes, torch.ones(2, 1), *rest, torch.float32, low, up)
        yield Case(f"low-rank-codes-{why}", "linear.codes_low_rank", given)

    yield from both("double", low.double(), up.double())
    yield from both("rows", low[:1], up)
    yield from both("outputs", low, up[:16])
    yield from both("types", low.half(), up)
    yield from both("gaps", low, torch.randn(17, 8)[:, ::2])
    yield Case("low-rank-input", "linear.real_low_rank", (x.double(), *rest, low, up))
