"""How long does each product of a model take, and how close is that to what the machine can do?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from qpass.runtime.roofline import Limits

# so many calls of one shape are kept to be timed in turn, as they follow each other in the model
# (more would only be more of the same)
MOST_CALLS = 64
# activations of a prompt are large: one call of each shape is enough, since weights come from cache
FEW_TOKENS = 16


@final
@dataclass(frozen=True, slots=True)
class Product:
    """All calls of one operator with one shape in a model that reads some tokens.

    Its weight has `outputs` rows of `inputs` numbers in `bytes`, with what belongs to it.
    `fraction` is the time that the limits allow over the time it took: of reading a set as large as
    the weights that took turns, or of multiplying, whichever is longer.
    """

    operator: str
    kind: str  # of the numbers that are multiplied: int8 or a float's
    tokens: int
    inputs: int
    outputs: int
    count: int
    bytes: int
    microseconds: float
    gigabytes: float  # a second
    teraoperations: float  # a second
    fraction: float | None

    @property
    def operations(self) -> int:
        """Products and sums of one call."""
        return 2 * self.tokens * self.inputs * self.outputs


@final
@dataclass(frozen=True, slots=True)
class _Call:
    run: Callable[[], object]
    operator: str
    tokens: int
    inputs: int
    outputs: int
    bytes: int
    kind: str


@final
class _Recorder(TorchDispatchMode):
    """Keeps the calls of products with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[object, ...], list[_Call]] = {}
        self.counts: dict[tuple[object, ...], int] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        if (describe := _PRODUCTS.get(func.name())) is not None and not kwargs:
            self._keep(describe(func, args, cast("Tensor", found)))
        return found

    def _keep(self, call: _Call) -> None:
        key = (call.operator, call.tokens, call.inputs, call.outputs, call.bytes, call.kind)
        self.counts[key] = self.counts.get(key, 0) + 1
        kept = self.calls.setdefault(key, [])
        if len(kept) < (MOST_CALLS if call.tokens <= FEW_TOKENS else 1):
            kept.append(call)


def _call(
    func: OpOverload, args: tuple[Any, ...], out: Tensor, x: Tensor, read: list[Any]
) -> _Call:
    size = sum(t.nbytes for t in read if isinstance(t, Tensor))
    kind = str(x.dtype).removeprefix("torch.")
    inputs, outputs = x.shape[-1], out.shape[-1]
    tokens = math.prod(x.shape[:-1])
    return _Call(lambda: func(*args), func.name(), tokens, inputs, outputs, size, kind)


# products with a weight: what is the input, and what is read beside it
_PRODUCTS: Mapping[str, Callable[[OpOverload, tuple[Any, ...], Tensor], _Call]] = {
    "aten::mm": lambda func, args, out: _call(func, args, out, args[0], [args[1]]),
    "aten::addmm": lambda func, args, out: _call(func, args, out, args[1], [args[0], args[2]]),
    "qpass::linear.codes": lambda func, args, out: _call(func, args, out, args[0], [*args[2:7]]),
    "qpass::linear.real": lambda func, args, out: _call(func, args, out, args[0], [*args[1:6]]),
}


def measure_products(
    run: Callable[[], object], limits: Limits, *, seconds: float = 0.1
) -> tuple[Product, ...]:
    """Time each distinct product that `run()` computes, for about `seconds`, longest in all first.

    Products are those of matrices with a weight that torch and qpass know as operators; `run` is
    called once, without gradients, and must not be compiled.
    """
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        run()
    products = [
        _timed(calls, recorder.counts[key], limits, seconds)
        for key, calls in recorder.calls.items()
    ]
    return tuple(sorted(products, key=lambda p: -p.count * p.microseconds))


def allowed(products: Sequence[Product], limits: Limits) -> float | None:
    """Seconds that the limits allow for all of `products` with their weights read in turn.

    None if there is no limit for one of them.
    """
    total = sum(p.count * p.bytes for p in products)
    times = [_allowed(p.bytes, p.operations, p.kind, total, limits) for p in products]
    known = [p.count * t for p, t in zip(products, times, strict=True) if t is not None]
    return sum(known) if len(known) == len(products) else None


def _allowed(size: int, operations: int, kind: str, among: int, limits: Limits) -> float | None:
    """Seconds for reading `size` of the `among` bytes that take turns, or for multiplying."""
    peak = limits.peak(kind)
    if peak is None:
        return None
    return max(size / limits.bandwidth(among) / 1e9, operations / peak / 1e12)


def _timed(calls: list[_Call], count: int, limits: Limits, seconds: float) -> Product:
    first = calls[0]
    times: list[float] = []
    with torch.no_grad():
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            begin = time.perf_counter()
            for call in calls:
                call.run()
            times.append((time.perf_counter() - begin) / len(calls))
    took = statistics.median(times)
    operations = 2 * first.tokens * first.inputs * first.outputs
    bound = _allowed(first.bytes, operations, first.kind, first.bytes * len(calls), limits)
    return Product(
        operator=first.operator,
        kind=first.kind,
        tokens=first.tokens,
        inputs=first.inputs,
        outputs=first.outputs,
        count=count,
        bytes=first.bytes,
        microseconds=took * 1e6,
        gigabytes=first.bytes / took / 1e9,
        teraoperations=operations / took / 1e12,
        fraction=None if bound is None else bound / took,
    )
