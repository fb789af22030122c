"""Is every call on every target served by a kernel that accepts it, or by plain PyTorch?"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from qpass.ops.packing import LINE, ROWS, columns_per_line
from qpass.runtime.gpu import KERNELS, PLAIN, Call, Kernel, choose, explain
from qpass.runtime.target import TARGETS

CALLS = 200
KINDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(draw: random.Random) -> tuple[Any, ...]:
    """The arguments of a linear from `weight` on."""
    bits, scaled = draw.choice((4, 8)), draw.random() < 0.7
    groups = draw.choice((1, 2, 8)) if scaled else 1
    k, n = groups * draw.choice((16, 24, 64, 100, 128)), draw.choice((1, 17, 64, 4096))
    lines = groups * -(-(k // groups) // columns_per_line(bits))
    blocks = -(-n // ROWS)
    scales = meta(blocks, groups, ROWS, dtype=torch.float16) if scaled else None
    offsets = scales if scaled and draw.random() < 0.5 else None
    weight = meta(blocks, lines, LINE, dtype=torch.uint8)
    return weight, meta(n), scales, offsets, None, bits, k, n


def real(draw: random.Random) -> tuple[Any, ...]:
    held = linear(draw)
    rows = draw.choice((0, 1, 2, 16, 65, 4096))
    return meta(rows, held[-2], dtype=draw.choice(KINDS)), *held


def codes(draw: random.Random) -> tuple[Any, ...]:
    held, rows = linear(draw), draw.choice((0, 1, 7, 128))
    x = meta(rows, held[-2], dtype=torch.int8)
    return x, meta(rows, 1), *held, draw.choice(KINDS)


def turned(draw: random.Random) -> tuple[Any, ...]:
    m, power = draw.choice((1, 3, 12, 28, 172, 428)), draw.choice((1, 16, 128, 4096))
    n = m * power * draw.choice((1, 1, 3))
    x = meta(draw.choice((0, 1, 300)), n, dtype=draw.choice(KINDS))
    return x, meta(n), meta(m, m), power


def quantized(draw: random.Random) -> tuple[Any, ...]:
    x, *rest = turned(draw)
    bits = draw.choice((2, 4, 8))
    return (x, bits, *rest) if draw.random() < 0.7 else (x, bits)


DRAWS: dict[str, Callable[[random.Random], tuple[Any, ...]]] = {
    "linear.real": real,
    "linear.codes": codes,
    "hadamard": turned,
    "quantize_rows": quantized,
}


def drawn(seed: int) -> Call:
    draw = random.Random(seed)
    operator = draw.choice(sorted(DRAWS))
    return Call.of(operator, DRAWS[operator](draw), draw.choice(TARGETS))


def test_a_legal_kernel_serves_each_random_call_or_none_would() -> None:
    plain = 0
    for seed in range(CALLS):
        call = drawn(seed)
        chosen = choose(call)
        accepting = [k for k in KERNELS if k.operator == call.operator and k.accepts(call) is None]
        if chosen.kernel is None:
            plain += 1
            assert accepting == []
            assert chosen.choice().kernel == PLAIN
        else:
            assert chosen.kernel in accepting
            assert chosen.kernel.preference == max(k.preference for k in accepting)
        # whoever comes first and does not serve has said why
        assert all(refusal.why for refusal in chosen.refused)
    # both ends happen, or nothing has been shown
    assert 0 < plain < CALLS // 2


def test_refusals_of_better_kernels_are_explained() -> None:
    x = meta(4, 64, dtype=torch.float64)
    text = explain("quantize_rows", x, 8, target=TARGETS[0]).text()
    assert text.startswith(PLAIN)
    assert "float64" in text


def cheapest(kernel: Kernel) -> Call | None:
    calls = (drawn(seed) for seed in range(CALLS))
    fitting = (c for c in calls if c.operator == kernel.operator and kernel.accepts(c) is None)
    return next(fitting, None)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_call_costs_at_least_its_tensors(kernel: Kernel) -> None:
    call = cheapest(kernel)
    if call is None:
        pytest.skip("no random call is served by it")
    cost = kernel.cost(call)
    weight = call.arguments.get("weight")
    given = weight if weight is not None else call.values[0]
    assert cost.nbytes >= given.numel() * given.element_size()
    assert call.target.seconds(cost.nbytes, cost.operations, cost.kind) > 0
