"""How fast are the compiled kernels beside torch's own, shape by shape?

Variants are timed in turn, round after round, and their medians compared; a variant whose result
is wrong is not timed. A few rows of activations meet weights from memory, not from a cache:
several copies of the weight take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

import qpass.ops as ops
from qpass.ops.library import specification
from qpass.runtime import device, native

# larger than any cache a core sees: cold weights
COLD_BYTES = 96 * 2**20
# so many rows and fewer wait for them
FEW_ROWS = 16
# a linear layer's relative error (in norm) that each kind of arithmetic may have
# (a rotation rounds differently in another order: now and then a code is off by one)
LIMITS = {
    "codes": 1e-5,
    "real": 1e-5,
    "codes of a rotation": 1e-2,
    "bfloat16": 2e-2,
    "float32": 1e-4,
    "attention": 1e-5,
}

# (out_features, in_features): the layers and the head of a small model, and one of a large model
LAYERS = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 8192))
ROWS = (1, 4, 16, 128, 512)
# width = order of the factor x power of two
ROTATIONS = ((576, 36, 16), (576, 9, 64), (1536, 12, 128), (8192, 1, 8192))
# query heads, key heads, queries, keys, width; queries are the last ones of the keys, and a cache
# has room for more
ATTENTIONS = (
    (9, 3, 512, 544, 64),
    (9, 3, 1, 544, 64),
    (32, 8, 512, 512, 128),
    (32, 8, 1, 4096, 128),
)
# a dense rotation of a larger width takes seconds
LARGEST_MATRIX = 2048


@final
@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute the same thing; `calls` take turns."""

    name: str
    calls: tuple[Callable[[], Tensor], ...]
    want: Tensor
    limit: float
    # bytes that one call must read at least, and integer or float operations it does
    bytes: int
    operations: int


@final
@dataclass(frozen=True, slots=True)
class Result:
    shape: str
    name: str
    median_us: float
    best_us: float
    gigabytes_per_s: float
    tera_operations_per_s: float
    error: float


def measure(shape: str, variants: list[Variant], seconds: float) -> list[Result]:
    """Check every variant, then time them in turn for about `seconds` each."""
    errors = [relative_error(v.calls[0](), v.want) for v in variants]
    right = [(v, error) for v, error in zip(variants, errors, strict=True) if error <= v.limit]
    times: dict[str, list[float]] = {v.name: [] for v, _ in right}
    end = time.perf_counter() + seconds * len(right)
    turn = 0
    while time.perf_counter() < end or turn < 3:
        # nobody always runs after the same neighbour, who may have emptied the caches
        first = turn % max(len(right), 1)
        for v, _ in right[first:] + right[:first]:
            call = v.calls[turn % len(v.calls)]
            begin = time.perf_counter()
            call()
            times[v.name].append(time.perf_counter() - begin)
        turn += 1
    wrong = [
        Result(shape, v.name, float("nan"), float("nan"), float("nan"), float("nan"), error)
        for v, error in zip(variants, errors, strict=True)
        if not error <= v.limit
    ]
    return [summary(shape, v, times[v.name], error) for v, error in right] + wrong


def summary(shape: str, variant: Variant, times: list[float], error: float) -> Result:
    median = statistics.median(times)
    return Result(
        shape=shape,
        name=variant.name,
        median_us=median * 1e6,
        best_us=min(times) * 1e6,
        gigabytes_per_s=variant.bytes / median / 1e9,
        tera_operations_per_s=variant.operations / median / 1e12,
        error=error,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def packed_layer(
    n: int, k: int, bits: int, width: int | None, offsets: bool, generator: torch.Generator
) -> ops.PackedLinear:
    """Random codes; groups of `width` columns (one per row if it is None or does not divide)."""
    groups = k // width if width is not None and k % width == 0 else 1
    unsigned = bits == 4 and offsets
    low = 0 if unsigned else -(2 ** (bits - 1))
    q = torch.randint(low, low + 2**bits, (n, k), dtype=torch.int16, generator=generator)
    s = torch.rand(n, groups, generator=generator) + 0.5
    return ops.pack_linear(
        q.to(torch.uint8 if unsigned else torch.int8),
        torch.rand(n, generator=generator) + 0.5,
        None if width is None else s.half(),
        -s.half() * 7 if offsets else None,
        bits=bits,
    )


def copies(packed: ops.PackedLinear, rows: int) -> list[ops.PackedLinear]:
    """Enough copies that a sweep over them leaves no weight in a cache; one for many rows."""
    count = 1 if rows > FEW_ROWS else max(1, COLD_BYTES // packed_bytes(packed))

    def copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.clone()

    return [
        dataclasses.replace(
            packed,
            weight=packed.weight.clone(),
            group_scales=copy(packed.group_scales),
            group_offsets=copy(packed.group_offsets),
        )
        for _ in range(count)
    ]


def packed_bytes(p: ops.PackedLinear) -> int:
    tensors = (p.weight, p.row_scales, p.group_scales, p.group_offsets)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def dense(p: ops.PackedLinear) -> Tensor:
    """The float64 weight that the codes stand for."""
    eye = torch.eye(p.in_features, dtype=torch.float64)
    scales = (p.group_scales, p.group_offsets)
    real = specification("linear.real")
    sizes = (p.bits, p.in_features, p.out_features)
    return real(eye, p.weight, p.row_scales, *scales, None, *sizes).T


def layer_variants(n: int, k: int, m: int, generator: torch.Generator) -> list[Variant]:
    x = torch.randn(m, k, generator=generator)
    codes, scales = ops.quantize_rows(x, 8)
    value = codes.double() * scales.double()
    operations = 2 * m * n * k
    found: list[Variant] = []
    for name, bits, width, offsets in (
        ("w8a8", 8, None, False),
        ("w4a8 g32 asymmetric", 4, 32, True),
        ("w4a8 per row", 4, None, False),
    ):
        p = packed_layer(n, k, bits, width, offsets, generator)
        calls = tuple(
            lambda p=p: ops.linear_codes(codes, scales, p, None, torch.float32)
            for p in copies(p, m)
        )
        want = value @ dense(p).T
        limit = LIMITS["codes"]
        found.append(Variant(name, calls, want, limit, packed_bytes(p), operations))
    for name, bits, width in (("w4a16 g64", 4, 64), ("w8a16", 8, None)):
        p = packed_layer(n, k, bits, width, False, generator)
        calls = tuple(lambda p=p: ops.linear_real(x, p, None) for p in copies(p, m))
        want = x.double() @ dense(p).T
        found.append(Variant(name, calls, want, LIMITS["real"], packed_bytes(p), operations))
    for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
        w = torch.randn(n, k, generator=generator).to(dtype)
        size = w.numel() * w.element_size()
        several = [w.clone() for _ in range(1 if m > FEW_ROWS else max(1, COLD_BYTES // size))]
        x_typed = x.to(dtype)
        calls = tuple(lambda w=w, x=x_typed: linear(x, w) for w in several)
        want = x_typed.double() @ w.double().T
        limit = LIMITS[str(dtype).removeprefix("torch.")]
        found.append(Variant(name, calls, want, limit, size, operations))
    w8 = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    several = [w8.clone() for _ in range(1 if m > FEW_ROWS else max(1, COLD_BYTES // w8.numel()))]
    calls = tuple(lambda w=w: torch._int_mm(codes, w.T) for w in several)
    want = codes.double() @ w8.double().T
    found.append(Variant("torch _int_mm", calls, want, 0.0, w8.numel(), operations))
    return found


def rotation_variants(
    n: int, order: int, power: int, m: int, generator: torch.Generator
) -> list[Variant]:
    x = torch.randn(m, n, generator=generator).to(torch.bfloat16)
    signs = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
    factor = torch.linalg.qr(torch.randn(order, order, generator=generator)).Q.contiguous()
    matrix = specification("hadamard")(torch.eye(n), signs, factor, power)
    want = x.double() @ matrix.double()
    both = 2 * m * n * n

    def product() -> Tensor:
        return x.float() @ matrix

    def fused() -> Tensor:
        return ops.quantize_rows(x, 8, signs, factor, power)[0]

    size = 3 * m * n
    quantize = specification("quantize_rows")
    rotated = quantize(x, 8, signs, factor, power)[0].double()
    plain = quantize(x, 8)[0].double()
    found = [
        Variant(
            "rotate and quantize", (fused,), rotated, LIMITS["codes of a rotation"], size, both
        ),
        Variant("quantize", (lambda: ops.quantize_rows(x, 8)[0],), plain, 0.0, size, 0),
        Variant(
            "rotate",
            (lambda: ops.hadamard(x, signs, factor, power),),
            want,
            LIMITS["bfloat16"],
            size,
            both,
        ),
    ]
    if n <= LARGEST_MATRIX:
        limit = LIMITS["float32"]
        found.append(Variant("torch matmul", (product,), want, limit, size, both))
    return found


def attention_variants(
    h: int, g: int, t: int, s: int, d: int, generator: torch.Generator
) -> list[Variant]:
    """A cache that is full for one query, and has room for the last of several; cold for one."""
    seen = torch.arange(s) <= torch.arange(t)[:, None] + (s - 1 if t == 1 else 0)
    mask = seen[None, None]
    q = torch.randn(1, t, h, d, generator=generator).transpose(1, 2)
    k = torch.randn(1, g, s, d, generator=generator)
    v = torch.randn(1, g, s, d, generator=generator)
    size = 2 * k.numel() * k.element_size()
    several = [(k.clone(), v.clone()) for _ in range(max(1, COLD_BYTES // size) if t == 1 else 1)]
    wide = specification("attention")(q.double(), k.double(), v.double(), mask, False, d**-0.5)
    limit, operations = LIMITS["attention"], 4 * h * d * int(seen.sum())

    def kernel(k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, mask, False, d**-0.5)

    def grouped(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    def repeated(k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1)
        return scaled_dot_product_attention(q, k, v, mask)

    found: list[Variant] = []
    for name, f in (("attention", kernel), ("torch", grouped), ("torch repeated", repeated)):
        calls = tuple(functools.partial(f, *pair) for pair in several)
        found.append(Variant(name, calls, wide, limit, size, operations))
    return found


def commit() -> str:
    """The commit measured, with a mark if the tree differs from it."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return run.stdout.strip() or "unknown"


def show(console: Console, results: list[Result]) -> None:
    table = Table("shape", "variant", "median us", "best us", "GB/s", "Tops/s", "error")
    shape = ""
    for r in results:
        if r.shape != shape:
            table.add_section()
            shape = r.shape
        numbers = (r.median_us, r.best_us, r.gigabytes_per_s, r.tera_operations_per_s)
        cells = [f"{v:.1f}" for v in numbers[:3]] + [f"{numbers[3]:.3f}"]
        if r.median_us != r.median_us:
            cells = ["wrong", "", "", ""]
        table.add_row(r.shape, r.name, *cells, f"{r.error:.0e}")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.15, help="for each variant and shape")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--layers", nargs="+", default=[f"{n}x{k}" for n, k in LAYERS])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(native.load().text())
    generator = torch.Generator().manual_seed(0)
    results: list[Result] = []
    with torch.inference_mode():
        for layer in options.layers:
            n, k = map(int, layer.split("x"))
            for m in options.rows:
                if m * n * k > 2**34:
                    continue
                variants = layer_variants(n, k, m, generator)
                results += measure(f"{m} x {k} -> {n}", variants, options.seconds)
        for n, order, power in ROTATIONS:
            for m in options.rows:
                variants = rotation_variants(n, order, power, m, generator)
                results += measure(f"{m} x {order} * {power}", variants, options.seconds)
        for h, g, t, s, d in ATTENTIONS:
            variants = attention_variants(h, g, t, s, d, generator)
            name = f"{t} x {s} of {h}/{g} x {d}"
            results += measure(name, variants, options.seconds)
    show(console, results)
    if options.json is not None:
        record = {
            "device": dataclasses.asdict(device.this_device()),
            "threads": options.threads,
            "commit": commit(),
            "results": [dataclasses.asdict(r) for r in results],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
