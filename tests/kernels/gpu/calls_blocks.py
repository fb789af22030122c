"""Calls of the operators on 4-bit floats in blocks: odd shapes, and ones to be refused."""

# n columns, m order of the factor, p order of the Sylvester matrix

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gpu.case import FLOATS, Case, random, rows, transform

KINDS = ((32, "e8m0"), (16, "e4m3"))
# (leading axes, blocks, m, p)
ROTATED = (
    ((5,), 1, 1, 64),
    ((3, 2), 1, 12, 32),
    ((1,), 3, 3, 32),
    ((4,), 3, 1, 32),
    ((7,), 6, 1, 16),
    ((2,), 1, 36, 64),
    ((1, 1), 1, 1, 512),
    ((3,), 2, 4, 8),
    ((2,), 1, 20, 256),
    ((0,), 1, 1, 32),
)
PLAIN = (((5,), 32), ((2, 3), 96), ((1,), 160), ((0,), 32), ((17,), 64), ((1,), 544))


def cases() -> Iterator[Case]:
    """Calls that some kernel serves."""
    for i, (lead, blocks, m, p) in enumerate(ROTATED):
        for block, scales in KINDS:
            n, dtype = blocks * m * p, FLOATS[i % 3]
            name = f"blocks-{lead}-{blocks}x{m}x{p}-{scales}-{dtype}"
            g = random(name)
            given = (rows((*lead, n), dtype, g), block, scales, *transform(n, m, g), p)
            yield Case(name, "quantize_blocks", given)
    for i, (lead, n) in enumerate(PLAIN):
        for j, (block, scales) in enumerate(KINDS):
            dtype = FLOATS[(i + j) % 3]
            name = f"blocks-{lead}-{n}-{scales}-{dtype}"
            x = rows((*lead, n), dtype, random(name))
            yield Case(name, "quantize_blocks", (x, block, scales))
    yield from products()
    apart = rows((6, 160), torch.float32, random("apart"))
    yield Case("blocks-rows-apart", "quantize_blocks", (apart[::2, :96], 16, "e4m3"))
    yield Case("blocks-columns-apart", "quantize_blocks", (apart[:, ::5], 32, "e8m0"))


# (leading axes of x, outputs, blocks)
PRODUCTS = (
    ((1,), 17, 3),
    ((3, 2), 16, 1),
    ((17,), 50, 9),
    ((1, 1), 200, 40),
    ((70,), 130, 5),
    ((5,), 1, 8),
    ((130,), 20, 4),
)


def products() -> Iterator[Case]:
    for i, (lead, n, blocks) in enumerate(PRODUCTS):
        for j, (block, scales) in enumerate(KINDS):
            dtype = FLOATS[(i + j) % 3]
            name = f"linear-{lead}-{n}x{blocks}x{block}-{scales}-{dtype}"
            g = random(name)
            x = held(lead, blocks, block, scales, g)
            if x[2].numel() > 2:
                x[2].view(-1)[1] = float("nan")
            codes, of_blocks, factors = held((n,), blocks, block, scales, g)
            bias = torch.randn(n, generator=g).to(dtype) if (i + j) % 2 else None
            given = (*x, codes, of_blocks, factors.flatten(), bias, scales, dtype)
            yield Case(name, "linear.blocks", given)


def held(
    lead: tuple[int, ...], blocks: int, block: int, scales: str, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Any codes; scales of very different sizes, and rows small enough for products in float16."""
    codes = torch.randint(0, 256, (*lead, blocks * block // 2), generator=g, dtype=torch.uint8)
    low, high = (107, 132) if scales == "e8m0" else (0, 127)
    of_blocks = torch.randint(low, high, (*lead, blocks), generator=g, dtype=torch.uint8)
    return codes, of_blocks, (torch.rand((*lead, 1), generator=g) + 0.5) * 2**-8


def refusals() -> Iterator[Case]:
    """Calls that no kernel may serve, though the specification has a meaning for most."""
    g = random("refused blocks")
    x = torch.randn(2, 64, generator=g)

    def case(why: str, x: Any, *rest: Any) -> Case:
        return Case(f"blocks-{why}", "quantize_blocks", (x, *rest))

    yield case("double", x.double(), 32, "e8m0")
    yield case("kind", x, 16, "e8m0")
    yield case("unknown", x, 16, "float16")
    yield case("width", x[:, :48], 32, "e8m0")
    order = 512
    wide = torch.empty(1, order, device="meta")
    large = torch.empty(order, order, device="meta")
    yield case("factor", wide, 16, "e4m3", torch.empty(order, device="meta"), large, 1)
    long = torch.empty(1, 2**16, dtype=torch.bfloat16, device="meta")
    yield case("long", long, 16, "e4m3")
    yield from refused_products()


def refused_products() -> Iterator[Case]:
    g = random("refused products")
    x = held((2,), 3, 32, "e8m0", g)
    codes, scales, factors = held((6,), 3, 32, "e8m0", g)
    weight, single = (codes, scales, factors.flatten()), torch.float32

    def case(why: str, *given: Any, kind: str = "e8m0", to: torch.dtype = single) -> Case:
        return Case(f"linear-blocks-{why}", "linear.blocks", (*given, None, kind, to))

    yield case("type", *x, *weight, to=torch.float64)
    yield case("few-codes", x[0][:, :16], *x[1:], *weight)
    yield case("kind", *x, *weight, kind="e4m3")
    yield case("nothing", *(t[:0] for t in x), *weight)
    yield case("place", *x, *weight[:2], weight[2].to("meta"))
    yield case("gaps", *x, *weight[:2], torch.ones(12)[::2])
    yield case("double", *x, *weight[:2], weight[2].double())
