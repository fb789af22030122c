"""What is the most that this machine could do: bytes read and numbers multiplied a second?"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.runtime import native

LINE = 64
# sets of bytes that are read over and over: from what one core's cache holds to what none does
SETS = tuple(2**power for power in (18, 20, 22, 24, 26, 28))
# a product of square float matrices this wide is far from any memory limit
WIDTH = 1024


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """The best that was seen with so many threads.

    `reads` are pairs of a size in bytes and the gigabytes a second at which a set of that size is
    read over and over. The rest are tera-operations a second, where a product and its sum count as
    two: of numbers in registers, with the instructions that the kernels use, or in torch's products
    of matrices, whichever is more. Integers of 8 bits are None without compiled kernels.
    """

    threads: int
    reads: tuple[tuple[int, float], ...]
    integer: float | None
    bfloat16: float
    float32: float

    def bandwidth(self, size: int) -> float:
        """Gigabytes a second for a set of `size` bytes, between measured sizes by their log."""
        for (small, fast), (large, slow) in itertools.pairwise(self.reads):
            if small <= size <= large:
                share = math.log(size / small) / math.log(large / small)
                return fast + share * (slow - fast)
        first, last = self.reads[0], self.reads[-1]
        return first[1] if size < first[0] else last[1]

    def peak(self, kind: str) -> float | None:
        """Tera-operations a second for products of int8 or a float type; None if not measured."""
        known = {"int8": self.integer, "bfloat16": self.bfloat16, "float32": self.float32}
        return known.get(kind)


@final
@dataclass(frozen=True, slots=True)
class Roofline:
    """The limits of one thread and of all of torch's, and the kernel that multiplied integers."""

    kernel: str | None
    limits: tuple[Limits, ...]

    @property
    def all_threads(self) -> Limits:
        """What everything that runs on torch's threads is measured by."""
        return self.limits[-1]


def measure(*, seconds: float = 0.1, largest: int = SETS[-1]) -> Roofline:
    """Measure the limits for about `seconds` each, reading sets of up to `largest` bytes.

    A cap on instruction sets (`native.capped`) holds here as it does for the kernels.
    """
    if not seconds > 0 or largest < SETS[0]:
        raise BadInput(
            f"seconds={seconds} and largest={largest}; at least {SETS[0]} bytes are read"
        )
    threads = torch.get_num_threads()
    data = torch.zeros(largest + LINE, dtype=torch.uint8, device="cpu")
    # pages that were never written share one page of zeros, which would be read from a cache
    data += 1
    sizes = [size for size in SETS if size <= largest]
    try:
        found = tuple(_limits(n, data, sizes, seconds) for n in sorted({1, threads}))
    finally:
        torch.set_num_threads(threads)
    return Roofline(_kernel(), found)


def _limits(threads: int, data: Tensor, sizes: list[int], seconds: float) -> Limits:
    torch.set_num_threads(threads)
    bfloat16, float32 = (_matrices(dtype, seconds) for dtype in (torch.bfloat16, torch.float32))
    integer = None
    if native.load().why is None:
        integer = _products(torch.int8, threads, seconds)
        float32 = max(float32, _products(torch.float32, threads, seconds))
        bfloat16 = max(bfloat16, _products(torch.bfloat16, threads, seconds))
    return Limits(
        threads=threads,
        reads=tuple((size, size / _read(data, size, seconds) / 1e9) for size in sizes),
        integer=integer,
        bfloat16=bfloat16,
        float32=float32,
    )


def _products(dtype: torch.dtype, threads: int, seconds: float) -> float:
    # long beside what calling and waking threads costs
    steps = 2**11
    operations = 2 * steps * threads * native.limit_products()
    return operations / _best(lambda: native.run_limits(None, steps, 1, dtype), seconds) / 1e12


def _read(data: Tensor, size: int, seconds: float) -> float:
    """Seconds for reading `size` bytes once; small sets are read often enough to be timed."""
    rounds = max(1, SETS[2] // size)
    if native.load().why is None:
        first = data[-data.data_ptr() % LINE :]
        return _best(lambda: native.run_limits(first, size // LINE, rounds), seconds) / rounds
    # a product with itself reads float32 as fast as plain PyTorch can
    numbers = data[:size].view(torch.float32)

    def several() -> None:
        for _ in range(rounds):
            torch.dot(numbers, numbers)

    return _best(several, seconds) / rounds


def _matrices(dtype: torch.dtype, seconds: float) -> float:
    a = torch.ones(WIDTH, WIDTH, dtype=dtype, device="cpu")
    return 2 * WIDTH**3 / _best(lambda: torch.mm(a, a), seconds) / 1e12


def _best(call: Callable[[], object], seconds: float) -> float:
    """The shortest of as many calls as fit, three at least after one that is not counted."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def _kernel() -> str | None:
    return native.limit_kernel() if native.load().why is None else None
