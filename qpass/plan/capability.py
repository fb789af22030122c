"""Which formats does a machine run fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Capability:
    """What the automatic choice of a format may depend on.

    `int8_dot`: products of bytes are summed faster than floats are. `int4_weights`: a kernel reads
    4-bit weights without widening them in memory first.
    """

    int8_dot: bool = False
    int4_weights: bool = False


def preset_for(capability: Capability) -> str:
    """The preset that `auto` stands for: the smallest weights that the machine is fast with."""
    if not capability.int8_dot:
        return "w8a16"
    return "w4a8" if capability.int4_weights else "w8a8"
