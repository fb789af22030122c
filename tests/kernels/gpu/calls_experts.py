"""Calls of the linear layers of experts: odd runs of rows, and ones to be refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qpass.ops.experts import PackedExperts, pack_experts
from tests.kernels.cases import KINDS, random_packed
from tests.kernels.gpu.case import FLOATS, Case, random

# (rows of each expert, rows of none, outputs, groups, columns of a group)
RUNS = (
    ((3, 0, 5), 0, 17, 3, 8),
    ((1, 1, 1, 1, 1), 0, 33, 1, 70),
    ((0, 0, 20), 4, 16, 2, 32),
    ((40,), 0, 50, 4, 9),
    ((0, 70, 3, 0), 1, 20, 1, 64),
    ((0, 0), 5, 16, 2, 16),
    ((18, 33, 90), 2, 80, 3, 136),
)


def experts(count: int, n: int, k: int, groups: int, kind: Any, seed: str) -> PackedExperts:
    g = random(seed)
    return pack_experts([random_packed(n, k, groups, kind, g) for _ in range(count)])


def cases() -> Iterator[Case]:
    """Calls that some kernel serves."""
    for i, (runs, left, n, groups, width) in enumerate(RUNS):
        for j, kind in enumerate(KINDS):
            dtype, k, count = FLOATS[(i + j) % 3], groups * width, len(runs)
            name = f"experts-{runs}-{n}x{groups}x{width}-{kind}-{dtype}"
            g = random(name)
            held = experts(count, n, k, groups, kind, name)
            x = (torch.randn((sum(runs) + left, k), generator=g) / k).to(dtype)
            ends = torch.tensor(runs).cumsum(0).to(torch.int32 if i % 2 else torch.int64)
            bias = torch.randn((count, n), generator=g).to(dtype) if (i + j) % 2 else None
            yield Case(name, "linear.experts", (x, ends, *parts(held, bias), held.bits, k, n))


def parts(held: PackedExperts, bias: Any) -> tuple[Any, ...]:
    return held.weight, held.row_scales, held.group_scales, held.group_offsets, bias


def refusals() -> Iterator[Case]:
    """Calls that no kernel may serve, though the specification has a meaning for most."""
    held = experts(2, 17, 24, 3, (8, True, True), "refused experts")
    whole, sizes = parts(held, torch.randn(2, 17)), (8, 24, 17)
    x, ends = torch.randn(5, 24), torch.tensor([2, 5])

    def case(why: str, *given: Any) -> Case:
        return Case(f"experts-{why}", "linear.experts", given)

    def changed(i: int, to: Any) -> tuple[Any, ...]:
        return (*whole[:i], to, *whole[i + 1 :])

    yield case("axes", x[None], ends, *whole, *sizes)
    yield case("floats", x, ends.float(), *whole, *sizes)
    yield case("count", x, ends[:1], *whole, *sizes)
    yield case("features", x[:, :23].contiguous(), ends, *whole, *sizes)
    yield case("double", x.double(), ends, *whole, *sizes)
    yield case("gaps", x, torch.zeros(4, dtype=torch.int64)[::2], *whole, *sizes)
    yield case("place", x, ends, *changed(1, held.row_scales.to("meta")), *sizes)
    yield case("double-bias", x, ends, *changed(4, torch.zeros(2, 17).double()), *sizes)
    yield case("type-of-weight", x, ends, *changed(0, held.weight.view(torch.int8)), *sizes)
    yield case("nothing", x[:0], ends, *whole, *sizes)
    many = 5000
    weight = torch.empty(many, 1, 6, 64, dtype=torch.uint8, device="meta")
    row_scales = torch.empty(many, 16, device="meta")
    there = torch.empty(many, dtype=torch.int64, device="meta")
    yield case(
        "many", x.to("meta"), there, weight, row_scales, None, None, None, 8, 24, 16
    )  # fmt: skip
