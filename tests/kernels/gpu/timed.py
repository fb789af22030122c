"""The calls that are timed on a real GPU, and how: replays of graphs that outgrow the caches."""

# r rows of activations, k in features, n out features

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.ops.packing import LINE, ROWS, columns_per_line
from tests.kernels.gpu.calls import random, transform

DEVICE = "cuda"
# what one graph reads, so that no call finds its operands in a cache
READ = 512e6
MOST_CALLS = 48
REPLAYS = 15
# the bits of scales around 1
SCALES = {"e8m0": (120, 132), "e4m3": (40, 72)}


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """A call to time; `make` draws new operands each time, `bar` is a fraction of the limit."""

    name: str
    operator: str
    make: Callable[[], tuple[Any, ...]]
    bar: float | None = None


def packed(n: int, k: int, bits: int, group: int | None, offsets: bool) -> tuple[Any, ...]:
    """The arguments of a linear from `weight` on: random codes and small scales."""
    groups = 1 if group is None else k // group
    lines = groups * -(-(k // groups) // columns_per_line(bits))
    blocks = -(-n // ROWS)
    weight = torch.randint(0, 256, (blocks, lines, LINE), dtype=torch.uint8, device=DEVICE)
    shape = (blocks, groups, ROWS)
    scales = None if group is None else torch.rand(shape, device=DEVICE).half() + 0.5
    shifts = torch.randn(shape, device=DEVICE).half() if offsets else None
    row_scales = torch.rand(n, device=DEVICE) * k**-0.5
    return (weight, row_scales, scales, shifts, None, bits, k, n)


def activations(r: int, k: int) -> Tensor:
    return torch.randn(r, k, device=DEVICE, dtype=torch.bfloat16)


def integers(r: int, k: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (r, k), dtype=torch.int8, device=DEVICE)
    return codes, torch.rand(r, 1, device=DEVICE) / 127


def timed() -> Iterator[Timed]:
    """Decoding and prefill shapes of models of about 8 billion parameters."""
    yield from _rows()
    for r, k, n, bar in (
        (1, 4096, 14336, 0.7),
        (1, 14336, 4096, 0.7),
        (1, 4096, 4096, None),
        (8, 4096, 14336, None),
        (64, 4096, 14336, None),
        (4096, 4096, 14336, None),
    ):
        for bits, group, offsets in ((4, 64, False), (4, 128, True), (8, None, False)):

            def real(r: int = r, k: int = k, n: int = n, w: Any = (bits, group, offsets)) -> Any:
                return activations(r, k), *packed(n, k, *w)

            yield Timed(
                f"w{bits}a16{'' if group is None else f' g{group}'} {r} x {k} x {n}",
                "linear.real",
                real,
                bar if bits == 4 else None,
            )
    for r, k, n, bar in (
        (1, 4096, 14336, None),
        (128, 4096, 4096, None),
        (4096, 4096, 4096, 0.6),
        (4096, 4096, 14336, 0.6),
    ):
        for bits, group in ((8, None), (4, None), (4, 128)):

            def codes(r: int = r, k: int = k, n: int = n, w: Any = (bits, group, False)) -> Any:
                return *integers(r, k), *packed(n, k, *w), torch.bfloat16

            yield Timed(
                f"w{bits}a8{'' if group is None else f' g{group}'} {r} x {k} x {n}",
                "linear.codes",
                codes,
                bar if bits == 8 else None,
            )
    yield from _blocks()
    yield from _experts()
    yield Timed("embedding 4096 of 128256 x 4096", "embedding", _embedding)
    for r in (1, 512):

        def points(r: int = r) -> Any:
            n, k, groups = 14336, 4096, 4096 // 32
            table = torch.randn(256, device=DEVICE)
            weight = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=DEVICE)
            scales = torch.rand(n, groups, device=DEVICE)
            ones = torch.ones(n, device=DEVICE)
            return activations(r, k), weight, table, ones, scales, None, None

        yield Timed(f"points g32 {r} x 4096 x 14336", "linear.points", points)


def _blocks() -> Iterator[Timed]:
    """Rows of 4-bit floats, and products of them."""
    for block, scales, kind in ((32, "e8m0", "mxfp4"), (16, "e4m3", "nvfp4")):
        for n, m, p in ((4096, 1, 4096), (8192, 1, 8192), (14336, 28, 512)):

            def turned(n: int = n, m: int = m, p: int = p, w: Any = (block, scales)) -> Any:
                signs, factor = transform(n, m, random(f"{n}"))
                return activations(8192, n), *w, signs.to(DEVICE), factor.to(DEVICE), p

            yield Timed(f"rotate + {kind} 8192 x {n} ({m} x {p})", "quantize_blocks", turned)

        def rows(w: Any = (block, scales)) -> Any:
            return activations(8192, 4096), *w

        yield Timed(f"{kind} 8192 x 4096", "quantize_blocks", rows)
        for r, k, n in ((1, 4096, 14336), (64, 4096, 14336), (4096, 4096, 4096)):

            def product(r: int = r, k: int = k, n: int = n, w: Any = (block, scales)) -> Any:
                block, scales = w

                def held(rows: int) -> tuple[Tensor, Tensor, Tensor]:
                    codes = _bytes(0, 256, rows, k // 2)
                    of_blocks = _bytes(*SCALES[scales], rows, k // block)
                    return codes, of_blocks, torch.rand(rows, device=DEVICE) / k

                codes, of_blocks, factors = held(r)
                rest = (None, scales, torch.bfloat16)
                return codes, of_blocks, factors[:, None], *held(n), *rest

            yield Timed(f"{kind} {r} x {k} x {n}", "linear.blocks", product)


def _experts() -> Iterator[Timed]:
    """Experts as models have them: few large ones and many small, for few tokens and many."""
    for experts, k, n, rows in (
        (8, 4096, 14336, 2), (8, 4096, 14336, 4096), (64, 2048, 1408, 48), (64, 2048, 1408, 12288),
    ):  # fmt: skip
        for bits, group in ((4, 128), (8, None)):

            def held(
                experts: int = experts, k: int = k, n: int = n, rows: int = rows,
                bits: int = bits, group: int | None = group,
            ) -> Any:  # fmt: skip
                stack = [packed(n, k, bits, group, False) for _ in range(experts)]
                weight, row_scales, scales, *_ = (
                    None if parts[0] is None else torch.stack(parts)
                    for parts in zip(*(one[:4] for one in stack), strict=True)
                )
                cuts = torch.randint(0, rows + 1, (experts,), device=DEVICE).sort().values
                cuts[-1] = rows
                x = activations(rows, k)
                return x, cuts, weight, row_scales, scales, None, None, bits, k, n

            name = f"w{bits}a16{'' if group is None else f' g{group}'}"
            yield Timed(f"{experts} experts {name} {rows} x {k} x {n}", "linear.experts", held)


def _bytes(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, device=DEVICE)


def _embedding() -> tuple[Any, ...]:
    table = torch.randint(-127, 128, (128256, 4096), dtype=torch.int8, device=DEVICE)
    indices = torch.randint(0, 128256, (4096,), device=DEVICE)
    return indices, table, torch.rand(128256, device=DEVICE), torch.bfloat16


def _rows() -> Iterator[Timed]:
    shapes = (
        (4096, 1, 4096, 0.75),
        (8192, 1, 8192, 0.75),
        (14336, 28, 512, None),
        (11008, 172, 64, None),
        (3072, 12, 256, None),
    )
    for n, m, p, bar in shapes:

        def turned(n: int = n, m: int = m, p: int = p, bits: tuple[int, ...] = ()) -> Any:
            signs, factor = transform(n, m, random(f"{n}"))
            return activations(8192, n), *bits, signs.to(DEVICE), factor.to(DEVICE), p

        yield Timed(f"hadamard 8192 x {n} ({m} x {p})", "hadamard", turned)
        for bits in (8, 4):

            def quantized(bits: int = bits, turned: Any = turned) -> Any:
                return turned(bits=(bits,))

            name = f"rotate + int{bits} 8192 x {n} ({m} x {p})"
            yield Timed(name, "quantize_rows", quantized, bar)
    yield Timed("int8 8192 x 4096", "quantize_rows", lambda: (activations(8192, 4096), 8))
    yield Timed("int8 1 x 4096", "quantize_rows", lambda: (activations(1, 4096), 8))


def seconds(calls: list[Callable[[], object]]) -> float:
    """The median time of one of `calls`, which run one after another in a CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = []
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(times)


def sets(nbytes: float, slow: float) -> int:
    """How many operand sets to rotate among: more than caches hold, fewer for long calls."""
    most = max(2, int(0.05 / max(slow, 1e-6)))
    return max(2, min(MOST_CALLS, most, int(READ / max(nbytes, 1.0)) + 1))


def limits() -> dict[str, float]:
    """What this GPU reaches on torch's own operations: bytes and operations a second."""
    source = torch.randn(2**28, device=DEVICE, dtype=torch.bfloat16)
    to = torch.empty_like(source)
    copies: list[Callable[[], object]] = [lambda: to.copy_(source)] * 8
    found = {"bandwidth": 2 * source.nbytes / seconds(copies)}
    size = 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    products: list[Callable[[], object]] = [lambda: a @ b] * 8
    found["bf16"] = 2 * size**3 / seconds(products)
    c, d = (
        torch.randint(-127, 128, (size, size), dtype=torch.int8, device=DEVICE) for _ in range(2)
    )
    whole: list[Callable[[], object]] = [lambda: torch._int_mm(c, d.t())] * 8
    found["int8"] = 2 * size**3 / seconds(whole)
    return found
