"""The numbers of a packed weight; `qpass/ops/packing.py` has the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from qpass.runtime.gpu import Call


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """Sizes: k columns, n rows, and lines of a block of rows."""

    bits: int
    k: int
    n: int
    lines: int
    groups: int
    scaled: bool

    @staticmethod
    def of(call: Call) -> Packed:
        scales = call["group_scales"]
        return Packed(
            call["bits"],
            call["in_features"],
            call["out_features"],
            call["weight"].shape[1],
            1 if scales is None else scales.shape[1],
            scales is not None,
        )

    @property
    def step(self) -> int:
        """Columns of a line."""
        return 32 // self.bits

    @property
    def width(self) -> int:
        """Columns of a group."""
        return self.k // self.groups

    @property
    def group_lines(self) -> int:
        return self.lines // self.groups
