"""The calls that GPU kernels are tried on: odd shapes of every operator, and ones to be refused."""

# n columns, m order of the factor, p order of the Sylvester matrix

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.kernels.cases import KINDS, random_packed
from tests.kernels.gpu import calls_blocks, calls_experts, calls_fours, calls_low_rank
from tests.kernels.gpu.case import FLOATS, Case, random, rows, transform

# (leading axes, blocks, m, p): short and long rows, orders that are no powers of two, one row
ROTATED = (
    ((5,), 1, 1, 64),
    ((3, 2), 1, 12, 4),
    ((1,), 3, 3, 16),
    ((7,), 1, 20, 1),
    ((4,), 3, 1, 32),
    ((2, 1, 3), 1, 5, 1),
    ((9,), 5, 1, 8),
    ((2,), 1, 36, 16),
    ((1, 1), 1, 1, 256),
    ((0,), 1, 1, 16),
)
PLAIN = (((5,), 7), ((3,), 1), ((2, 3), 100), ((1,), 129), ((0,), 16), ((17,), 33), ((1,), 512))


# (rows, blocks, p) of one block and of several
TALL = ((64, 1, 8192), (65, 2, 8192), (66, 2, 8192), (67, 1, 16384), (65, 1, 16384), (70, 1, 8192))
# (rows, blocks, m, p) with a factor, in 16-bit floats
FACTORED = (
    (17, 1, 12, 4),
    (16, 2, 3, 8),
    (33, 1, 20, 1),
    (19, 3, 5, 2),
    (16, 1, 36, 16),
    (21, 1, 2, 32),
    (18, 1, 28, 64),
)
# (rows, p) of one block, in 16-bit floats: all orders of one kernel, and rows that end a turn
TURNED = ((256, 256), (257, 512), (259, 1024), (256, 2048), (258, 4096))
# (rows, out features, groups, columns of a group) of which the weights are written out
MANY = ((384, 65, 1, 64), (385, 40, 2, 32), (390, 49, 3, 20), (384, 64, 1, 7), (386, 81, 4, 9))
# (leading axes of x, out features, groups, columns of a group)
LINEAR = (
    ((1,), 17, 3, 8),
    ((1, 1), 33, 1, 70),
    ((1,), 5, 5, 7),
    ((1,), 64, 1, 264),
    ((1,), 48, 2, 136),
    ((1,), 32, 9, 32),
    ((1,), 16, 1, 3),
    ((5,), 40, 2, 32),
    ((3, 2), 16, 1, 100),
    ((3,), 50, 4, 9),
    ((2,), 48, 4, 64),
    ((4,), 24, 1, 50),
    ((17,), 50, 4, 9),
    ((2, 1, 2), 1, 1, 1),
    ((33,), 20, 3, 16),
    ((70,), 80, 1, 64),
    ((0,), 16, 1, 16),
)


def cases() -> Iterator[Case]:
    """Calls that some kernel serves."""
    yield from rotations()
    yield from quantizations()
    yield from linears()
    yield from points()
    yield from embeddings()
    yield from calls_blocks.cases()
    yield from calls_experts.cases()
    yield from calls_low_rank.cases()
    yield from calls_fours.cases()


def rotations() -> Iterator[Case]:
    for i, (lead, blocks, m, p) in enumerate(ROTATED):
        dtype = FLOATS[i % 3]
        name = f"hadamard-{lead}-{blocks}x{m}x{p}-{dtype}"
        g, n = random(name), blocks * m * p
        yield Case(name, "hadamard", (rows((*lead, n), dtype, g), *transform(n, m, g), p))


def quantizations() -> Iterator[Case]:
    for i, (lead, blocks, m, p) in enumerate(ROTATED):
        for bits in (8, 4) if i % 2 else (8, 3):
            dtype = FLOATS[(i + bits) % 3]
            name = f"quantize-{lead}-{blocks}x{m}x{p}-{bits}-{dtype}"
            g, n = random(name), blocks * m * p
            x = rows((*lead, n), dtype, g)
            yield Case(name, "quantize_rows", (x, bits, *transform(n, m, g), p))
    for i, (lead, n) in enumerate(PLAIN):
        dtype = FLOATS[i % 3]
        name = f"quantize-{lead}-{n}-{dtype}"
        yield Case(name, "quantize_rows", (rows((*lead, n), dtype, random(name)), 8 - 2 * (i % 3)))
    # enough rows for programs that stay: of one block, of three, and of 16-bit floats both
    for i, (r, blocks, p) in enumerate(TALL):
        for bits in (8, 4, 0):
            dtype = FLOATS[1 + (i + bits // 4) % 2]
            name = f"tall-{r}-{blocks}x{p}-{bits}-{dtype}"
            g, n = random(name), blocks * p
            x, rest = rows((r, n), dtype, g), (*transform(n, 1, g), p)
            yield (
                Case(name, "quantize_rows", (x, bits, *rest))
                if bits
                else Case(name, "hadamard", (x, *rest))
            )
    for i, (r, p) in enumerate(TURNED):
        for bits in (8, 3, 0):
            dtype = FLOATS[1 + (i + bits) % 2]
            name = f"turned-{r}-{p}-{bits}-{dtype}"
            g = random(name)
            x, rest = rows((r, p), dtype, g), (*transform(p, 1, g), p)
            yield (
                Case(name, "quantize_rows", (x, bits, *rest))
                if bits
                else Case(name, "hadamard", (x, *rest))
            )
    for r, blocks, m, p in FACTORED:
        for bits in (8, 0):
            name = f"factored-{r}-{blocks}x{m}x{p}-{bits}"
            g, n = random(name), blocks * m * p
            dtype = FLOATS[1 + r % 2]
            x, (signs, factor) = rows((r, n), dtype, g), transform(n, m, g)
            if m == 2:
                # a Hadamard matrix, of which the first part is everything
                factor = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) * 2**-0.5
            if m in (5, 12, 36):
                # invertible ones are factors as well
                factor = factor * torch.logspace(-1, 1, m)
            rest = (signs, factor, p)
            yield (
                Case(name, "quantize_rows", (x, bits, *rest))
                if bits
                else Case(name, "hadamard", (x, *rest))
            )
    g = random("strided")
    apart = rows((6, 40), torch.float32, g)
    yield Case("quantize-rows-apart", "quantize_rows", (apart[::2, :24], 8))
    yield Case("quantize-columns-apart", "quantize_rows", (apart[:, ::2], 8))


def linears() -> Iterator[Case]:
    for i, (lead, n, groups, width) in enumerate(LINEAR):
        for j, kind in enumerate(KINDS):
            k, dtype = groups * width, FLOATS[(i + j) % 3]
            name = f"{lead}-{n}x{groups}x{width}-{kind}-{dtype}"
            g = random(name)
            held = random_packed(n, k, groups, kind, g)
            bias = torch.randn(n, generator=g).to(dtype) if (i + j) % 2 else None
            rest = (
                held.weight, held.row_scales, held.group_scales, held.group_offsets, bias,
                held.bits, k, n,
            )  # fmt: skip
            x = (torch.randn((*lead, k), generator=g) / k).to(dtype)
            yield Case(f"real-{name}", "linear.real", (x, *rest))
            codes = torch.randint(-127, 128, (*lead, k), generator=g, dtype=torch.int8)
            scales = torch.rand((*lead, 1), generator=g) / (127 * k)
            if scales.numel() > 2:
                scales.view(-1)[1] = float("nan")
            yield Case(f"codes-{name}", "linear.codes", (codes, scales, *rest, dtype))
    for i, (r, n, groups, width) in enumerate(MANY):
        for j, kind in enumerate(KINDS):
            k, dtype = groups * width, FLOATS[1 + (i + j) % 2]
            name = f"many-{r}-{n}x{groups}x{width}-{kind}-{dtype}"
            g = random(name)
            held = random_packed(n, k, groups, kind, g)
            bias = torch.randn(n, generator=g).to(dtype) if (i + j) % 3 else None
            rest = (
                held.weight, held.row_scales, held.group_scales, held.group_offsets, bias,
                held.bits, k, n,
            )  # fmt: skip
            yield Case(
                f"real-{name}", "linear.real", (torch.randn(r, k, generator=g).to(dtype), *rest)
            )
    x = torch.randn(7, 48, generator=random("apart")) / 32
    g = random("strided")
    held = random_packed(24, 24, 3, (4, True, True), g)
    rest = (held.weight, held.row_scales, held.group_scales, held.group_offsets, None, 4, 24, 24)
    yield Case("real-rows-apart", "linear.real", (x[:, :24], *rest))
    yield Case("real-columns-apart", "linear.real", (x[:, ::2], *rest))


def points() -> Iterator[Case]:
    written = [((r % 16 + 16,), *rest) for r, *rest in MANY]
    for i, (lead, n, groups, width) in enumerate((*LINEAR, *written)):
        k, dtype = groups * width, FLOATS[i % 3 if i < len(LINEAR) else 1 + i % 2]
        name = f"points-{lead}-{n}x{groups}x{width}-{dtype}"
        g = random(name)
        codes = torch.randint(0, 256, (n, k), generator=g, dtype=torch.uint8)
        table, row_scales = torch.randn(256, generator=g), torch.rand(n, generator=g) + 0.5
        scales = torch.rand(n, groups, generator=g) + 0.5 if i % 3 else None
        offsets = torch.randn(n, groups, generator=g) if i % 3 == 2 else None
        bias = torch.randn(n, generator=g).to(dtype) if i % 2 else None
        x = (torch.randn((*lead, k), generator=g) / k).to(dtype)
        if i % 4 == 3:
            codes = codes.view(torch.int8)
        yield Case(name, "linear.points", (x, codes, table, row_scales, scales, offsets, bias))


def embeddings() -> Iterator[Case]:
    for i, (lead, width) in enumerate((*PLAIN, ((3, 5), 40), ((33,), 300))):
        dtype = FLOATS[i % 3]
        g = random(f"embedding-{lead}-{width}")
        table = torch.randint(-128, 128, (50, width), generator=g, dtype=torch.int8)
        kind = torch.int32 if i % 2 else torch.int64
        indices = torch.randint(0, 50, lead, generator=g).to(kind)
        arguments = (indices, table, torch.rand(50, generator=g), dtype)
        yield Case(f"embedding-{lead}-{width}-{dtype}", "embedding", arguments)


def refusals() -> Iterator[Case]:
    """Calls that no kernel may serve, though the specification has a meaning for most."""
    g = random("refused")
    x = torch.randn(2, 16, generator=g)
    signs, factor = transform(16, 1, g)
    many = 2**16
    for bits in ((), (8,)):
        operator = "quantize_rows" if bits else "hadamard"

        def case(why: str, x: Tensor, *rest: Any, bits: Any = bits, to: str = operator) -> Case:
            return Case(f"{to}-{why}", to, (x, *bits, *rest))

        yield case("double", x.double(), signs, factor, 16)
        yield case("empty", x[:, :0], signs[:0], factor, 1)
        yield case("wide-signs", x, signs.double(), factor.double(), 16)
        yield case("power", x, signs, factor, 12)
        yield case("few-signs", x, signs[:3], factor, 16)
        long = torch.empty(1, many, dtype=torch.bfloat16, device="meta")
        yield case("long", long, torch.empty(many, device="meta"), factor, many)
        order = 512
        wide = torch.empty(1, order, device="meta")
        large = torch.empty(order, order, device="meta")
        yield case("factor", wide, torch.empty(order, device="meta"), large, 1)
    gaps = torch.ones(32)[::2]
    yield Case("hadamard-gaps", "hadamard", (x, gaps, factor, 16))
    tall = torch.empty(256, many, dtype=torch.bfloat16, device="meta")
    signs_there = torch.empty(many, device="meta")
    factor_there = torch.empty(1, 1, device="meta")
    yield Case("hadamard-tall", "hadamard", (tall, signs_there, factor_there, many))
    two = torch.empty(2, 2, device="meta")
    yield Case("hadamard-long-factor", "hadamard", (tall, signs_there, two, many // 2))
    yield Case("quantize-bits", "quantize_rows", (x, 9))
    yield Case("quantize-half-a-transform", "quantize_rows", (x, 8, signs, None, 1))
    long = torch.empty(1, many + 1, dtype=torch.bfloat16, device="meta")
    yield Case("quantize-long", "quantize_rows", (long, 8))
    yield from refused_linears()
    yield from refused_points()
    yield from refused_embeddings()
    yield from calls_blocks.refusals()
    yield from calls_experts.refusals()
    yield from calls_low_rank.refusals()
    yield from calls_fours.refusals()


def refused_linears() -> Iterator[Case]:
    """Weights and inputs of the wrong type, place or size."""
    g = random("refused linears")
    held = random_packed(17, 24, 3, (8, True, True), g)
    whole = (
        held.weight, held.row_scales, held.group_scales, held.group_offsets, torch.randn(17), 8,
    )  # fmt: skip
    sizes = (24, 17)
    x = torch.randn(2, 24, generator=g)
    codes = torch.randint(-9, 9, (2, 24), generator=g, dtype=torch.int8)
    scales = torch.rand(2, 1, generator=g)

    def both(why: str, weight: tuple[Any, ...], sizes: tuple[int, ...] = sizes) -> Iterator[Case]:
        yield Case(f"real-{why}", "linear.real", (x, *weight, *sizes))
        yield Case(f"real-one-row-{why}", "linear.real", (x[:1], *weight, *sizes))
        kind = torch.float32
        yield Case(f"codes-{why}", "linear.codes", (codes, scales, *weight, *sizes, kind))

    def changed(i: int, to: Any) -> tuple[Any, ...]:
        return (*whole[:i], to, *whole[i + 1 :])

    yield from both("features", whole, (23, 17))
    yield from both("place", changed(1, held.row_scales.to("meta")))
    yield from both("gaps", changed(1, torch.rand(34)[::2]))
    yield from both("double-bias", changed(4, torch.randn(17).double()))
    yield from both("type-of-weight", changed(0, held.weight.view(torch.int8)))
    yield from both("shape-of-weight", changed(0, held.weight[:1]))
    yield Case("real-double", "linear.real", (x.double(), *whole, *sizes))
    yield Case("real-double-one-row", "linear.real", (x[:1].double(), *whole, *sizes))
    rest = (*whole, *sizes)
    single = torch.float32
    yield Case("codes-short", "linear.codes", (codes.short(), scales, *rest, single))
    yield Case("codes-double", "linear.codes", (codes, scales, *rest, torch.float64))
    yield Case("codes-double-scales", "linear.codes", (codes, scales.double(), *rest, single))
    yield Case("codes-few-scales", "linear.codes", (codes, scales[:1], *rest, single))


def refused_points() -> Iterator[Case]:
    g = random("refused points")
    codes = torch.randint(0, 256, (6, 8), generator=g, dtype=torch.uint8)
    table, ones, scales = torch.randn(256, generator=g), torch.ones(6), torch.ones(6, 2)
    x = torch.randn(2, 8, generator=g)

    def case(why: str, *changed: Any) -> Case:
        return Case(f"points-{why}", "linear.points", changed)

    yield case("double", x.double(), codes, table, ones, scales, None, None)
    half = torch.zeros(2, 8, dtype=torch.float16)
    yield case("half-and-short", half, codes.short(), table, ones, scales, None, None)
    yield case("short", x, codes.short(), table, ones, scales, None, None)
    yield case("features", x[:, :6], codes, table, ones, scales, None, None)
    yield case("small-table", x, codes, table[:16], ones, scales, None, None)
    yield case("gaps", x, codes, table, torch.ones(12)[::2], scales, None, None)
    yield case("double-scales", x, codes, table, ones.double(), scales, None, None)
    yield case("offsets-alone", x, codes, table, ones, None, torch.ones(6, 1), None)


def refused_embeddings() -> Iterator[Case]:
    codes, scales = torch.zeros(5, 8, dtype=torch.int8), torch.ones(5)
    at, single = torch.zeros(3, dtype=torch.int64), torch.float32
    for why, arguments in (
        ("bytes", (at.to(torch.uint8), codes, scales, single)),
        ("wide-table", (at, codes.short(), scales, single)),
        ("double", (at, codes, scales, torch.float64)),
        ("few-scales", (at, codes, scales[:3], single)),
        ("place", (at.to("meta"), codes, scales, single)),
        ("gaps", (at, codes[:, ::2], scales, single)),
    ):
        yield Case(f"embedding-{why}", "embedding", arguments)
