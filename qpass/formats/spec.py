"""How a tensor is quantized: a format, and what shares a scale of which precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch

from qpass.errors import BadInput, expect, expect_type
from qpass.formats.base import FORMATS, Format
from qpass.registry import unknown

SCALE_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}
ROW_SCALE_BITS = 32


@final
@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A format, blocks that share a scale, and the precision of the scales.

    Blocks run along `axis`, the axis that a product sums over: `block` of its entries, all of them
    ("channel"; for activations this is one scale per token), or the whole tensor ("tensor").
    An asymmetric grid adds an offset, in the same precision, to each scale. `dynamic` scales are
    found when the values are: they are not stored.
    """

    format: str
    block: int | Literal["tensor", "channel"] = "channel"
    axis: int = -1
    scale_format: str = "float32"
    symmetric: bool = True
    dynamic: bool = False

    def __post_init__(self) -> None:
        block: object = self.block
        sized = isinstance(block, int) and not isinstance(block, bool) and block > 0
        words = block in ("tensor", "channel")
        expect_type(str, "format", self.format, "the name of a number format")
        expect(sized or words, "block", block, '"tensor", "channel" or a positive integer')
        expect_type(int, "axis", self.axis, "an integer")
        known = tuple(SCALE_DTYPES)
        expect(self.scale_format in known, "scale_format", self.scale_format, " or ".join(known))
        expect_type(bool, "symmetric", self.symmetric, "true or false")
        expect_type(bool, "dynamic", self.dynamic, "true or false")
        signed = FORMATS[self.format].low < 0
        expect(signed, "format", self.format, "a signed format; symmetric = false adds offsets")

    @staticmethod
    def read(given: Mapping[str, object], base: QuantSpec | None = None) -> QuantSpec:
        """A spec from a table of its fields; what is absent comes from `base` or the defaults."""
        known = [field.name for field in dataclasses.fields(QuantSpec)]
        for key in given:
            if key not in known:
                raise unknown("quantization key", key, known)
        if base is not None:
            return dataclasses.replace(base, **cast("dict[str, Any]", dict(given)))
        if "format" not in given:
            raise BadInput("format is missing: name a number format")
        return QuantSpec(**cast("dict[str, Any]", dict(given)))

    def table(self) -> dict[str, str | int | bool]:
        """The fields by name, as `read` takes them."""
        return dataclasses.asdict(self)

    @property
    def codes(self) -> Format:
        """The format whose codes are stored: an asymmetric grid may count from zero."""
        found = FORMATS[self.format]
        return found if found.unsigned is None or self.symmetric else FORMATS[found.unsigned]

    @property
    def scale_dtype(self) -> torch.dtype:
        return SCALE_DTYPES[self.scale_format]

    @property
    def grouped(self) -> bool:
        """Whether scales are stored by group; otherwise the row's float32 factor is the scale."""
        return isinstance(self.block, int) or not self.symmetric or self.scale_format != "float32"

    def groups(self, width: int) -> int:
        """How many blocks a row of `width` entries has (1 where rows share a scale)."""
        return width // self.block if isinstance(self.block, int) else 1

    def supports(self, shape: Sequence[int]) -> str | None:
        """Why a `[rows, width]` tensor cannot take this spec, or None when it can."""
        if len(shape) != 2:
            return f"has {len(shape)} axes, not rows and columns"
        if isinstance(self.block, int) and shape[1] % self.block:
            return f"width {shape[1]} is not a multiple of the block {self.block}"
        return None

    def per_channel(self) -> QuantSpec:
        """The same grid with one scale per row, which every width supports."""
        # an offset is stored with a group's scale, in the precision that groups have
        scale_format = "float32" if self.symmetric else self.scale_format
        return dataclasses.replace(self, block="channel", scale_format=scale_format)

    def bits_per_weight(self, width: int) -> float:
        """Stored bits for each of the `width` entries of a row, scales and offsets included."""
        scales = 0
        if self.grouped:
            numbers = self.groups(width) * (1 if self.symmetric else 2)
            scales = numbers * torch.finfo(self.scale_dtype).bits
        return self.codes.bits / self.codes.dim + (scales + ROW_SCALE_BITS) / width
