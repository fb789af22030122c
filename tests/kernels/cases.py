"""The calls every kernel is tried on, and the paths it can be reached by."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

import qpass.ops as ops
from qpass.runtime import native
from qpass.runtime.native import Isa

# (bits, has group scales, has group offsets)
KINDS = [
    (8, False, False),
    (8, True, False),
    (8, True, True),
    (4, False, False),
    (4, True, False),
    (4, True, True),
]


def paths() -> list[Isa]:
    """Every instruction set that this build and machine can run, emulated tiles included."""
    found = native.load()
    if found.newest is None:
        return []
    runs = [isa for isa in found.built if isa <= found.newest]
    if Isa.AMX_EMULATED in found.built and found.newest >= Isa.AVX512VNNI:
        runs.append(Isa.AMX_EMULATED)
    return runs


@contextmanager
def poisoned() -> Generator[None]:
    """Uninitialised memory holds NaN (or the largest integer) inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def random_packed(
    n: int, k: int, groups: int, kind: tuple[int, bool, bool], generator: torch.Generator
) -> ops.PackedLinear:
    """A weight with random codes, scales and offsets; ungrouped kinds ignore `groups`."""
    bits, scaled, shifted = kind
    unsigned = bits == 4 and shifted
    low = 0 if unsigned else -(2 ** (bits - 1))
    q = torch.randint(low, low + 2**bits, (n, k), dtype=torch.int16, generator=generator)
    rows = torch.rand(n, generator=generator) + 0.5
    s = torch.rand(n, groups, generator=generator) + 0.5
    m = torch.randn(n, groups, generator=generator) * 4
    return ops.pack_linear(
        q.to(torch.uint8 if unsigned else torch.int8),
        rows,
        s.to(torch.float16) if scaled else None,
        m.to(torch.float16) if shifted else None,
        bits=bits,
    )
