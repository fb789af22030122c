"""How Triton is made to multiply integers of 4 bits, for which it has no type.

Of `mma.m16n8k64` on 4-bit integers a lane holds the same bytes as of `mma.m16n8k32` on bytes, each
byte being two neighbours of the axis that is summed over. So a product of packed bytes, as Triton
compiles it, is one of 4-bit integers when the instruction's name says so in PTX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton

BYTES = re.compile(r"mma\.sync\.aligned\.m16n8k32\.row\.col((?:\.satfinite)?)\.s32\.s8\.s8\.s32")
ANY = re.compile(r"mma\S*\.[su]8\.[su]8\.s32")
HOOK = "add_stages_inspection_hook"
# what tells code that was compiled so from other code, in caches too
MARK = "products of 4-bit integers"


def in_fours(ptx: str) -> str:
    """PTX whose products of bytes are products of pairs of 4-bit integers."""
    found, count = BYTES.subn(r"mma.sync.aligned.m16n8k64.row.col\1.s32.s4.s4.s32", ptx)
    if count == 0 or ANY.search(found):
        raise RuntimeError("this Triton multiplies bytes by instructions unknown here")
    return found


def has_hook() -> bool:
    """Whether this Triton lets code be changed on its way."""
    return hasattr(triton.knobs.runtime, HOOK)


def _hook(*given: Any) -> tuple[str, str] | None:
    if not given:
        return MARK, MARK
    stages: dict[str, Callable[[Any, Any], Any]] = given[1]
    to_ptx = stages["ptx"]
    stages["ptx"] = lambda source, metadata: in_fours(to_ptx(source, metadata))
    return None


@contextmanager
def fours() -> Iterator[None]:
    """Kernels that are compiled or launched inside multiply 4-bit integers, not bytes."""
    runtime: Any = triton.knobs.runtime
    before = getattr(runtime, HOOK)
    setattr(runtime, HOOK, _hook)
    try:
        yield
    finally:
        setattr(runtime, HOOK, before)
