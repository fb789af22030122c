"""How a tensor is quantized: a format, and what shares a scale of which precision."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch

from qpass.errors import BadInput, expect, expect_type
from qpass.formats.base import FORMATS, Format
from qpass.formats.integers import Integers
from qpass.formats.scales import SCALES, ScaleFormat
from qpass.registry import unknown

ROW_SCALE_BITS = 32


@final
@dataclass(frozen=True, slots=True)
class QuantSpec:
    """A format, blocks that share a scale, and the precision of the scales.

    Blocks run along `axis`, the axis that a product sums over: `block` of its entries, all of them
    ("channel"; for activations this is one scale per token), or the whole tensor ("tensor").
    An asymmetric grid adds an offset, in the same precision, to each scale. `tensor_scale` puts a
    float32 factor over the scales of blocks: one for a weight, one for each token of activations.
    `dynamic` scales are found when the values are: they are not stored. The last point of such a
    grid lies at `clip` times the extreme that it serves. Activations that are not dynamic have one
    `scale` for all values, and `zero` is the code of 0.0 where they are asymmetric; None until data
    has been seen. Their integers use every code of their bits, the lowest one too.
    """

    format: str
    block: int | Literal["tensor", "channel"] = "channel"
    axis: int = -1
    scale_format: str = "float32"
    tensor_scale: bool = False
    symmetric: bool = True
    dynamic: bool = False
    clip: float = 1.0
    scale: float | None = None
    zero: int = 0

    def __post_init__(self) -> None:
        block: object = self.block
        sized = isinstance(block, int) and not isinstance(block, bool) and block > 0
        words = block in ("tensor", "channel")
        expect_type(str, "format", self.format, "the name of a number format")
        expect(sized or words, "block", block, '"tensor", "channel" or a positive integer')
        expect_type(int, "axis", self.axis, "an integer")
        known = sorted(scales.name for scales in SCALES)
        expect(self.scale_format in known, "scale_format", self.scale_format, " or ".join(known))
        expect_type(bool, "tensor_scale", self.tensor_scale, "true or false")
        expect_type(bool, "symmetric", self.symmetric, "true or false")
        expect_type(bool, "dynamic", self.dynamic, "true or false")
        expect(_number(self.clip) and 0 < self.clip <= 1, "clip", self.clip, "a number in (0, 1]")
        positive = _number(self.scale) and 0 < cast("float", self.scale) < math.inf
        expect(self.scale is None or positive, "scale", self.scale, "a positive number")
        expect_type(int, "zero", self.zero, "an integer")
        signed = FORMATS[self.format].low < 0
        expect(signed, "format", self.format, "a signed format; symmetric = false adds offsets")
        self._check_together()

    def _check_together(self) -> None:
        """Raise BadInput, naming a field, unless the fields go together."""
        scales = self.scales
        if not self.symmetric:
            why = f"true: {self.format} has no codes that count from zero"
            expect(isinstance(FORMATS[self.format], Integers), "symmetric", False, why)
            why = f"true: {self.scale_format} scales are positive, and offsets are not"
            expect(scales.signed, "symmetric", False, why)
        if self.tensor_scale:
            why = "false: without blocks, a scale of its own is all that a row needs"
            expect(isinstance(self.block, int), "tensor_scale", True, why)
            why = f"false: {self.scale_format} scales reach any magnitude without"
            expect(scales.needs_factor, "tensor_scale", True, why)
        elif scales.needs_factor:
            why = f"true: {self.scale_format} scales end at {scales.top:g}"
            expect(False, "tensor_scale", False, why)
        why = "1.0: only dynamic scales follow an extreme that could be clipped"
        expect(self.dynamic or self.clip == 1, "clip", self.clip, why)
        one = not self.dynamic and self.block == "tensor"
        why = 'nothing: one number is the scale of a whole tensor (block = "tensor") that is static'
        expect(one or self.scale is None, "scale", self.scale, why)
        if self.zero:
            why = "0: a code of zero belongs to a static scale of an asymmetric grid"
            expect(self.scale is not None and not self.symmetric, "zero", self.zero, why)
            first, last = self.whole_range
            expect(first <= self.zero <= last, "zero", self.zero, f"a code in {first} .. {last}")

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
        found = dataclasses.asdict(self)
        if not self.tensor_scale:
            # written as it was before there were such factors
            del found["tensor_scale"]
        for name, usual in (("clip", 1.0), ("scale", None), ("zero", 0)):
            # the same
            if found[name] == usual:
                del found[name]
        return found

    @property
    def codes(self) -> Format:
        """The format whose codes are stored: an asymmetric grid may count from zero."""
        found = FORMATS[self.format]
        return found if found.unsigned is None or self.symmetric else FORMATS[found.unsigned]

    @property
    def static(self) -> bool:
        """Whether this is one scale for a whole tensor of activations, known before they are."""
        return not self.dynamic and self.block == "tensor"

    @property
    def integers(self) -> bool:
        """Whether the points are integers."""
        return isinstance(FORMATS[self.format], Integers)

    @property
    def whole_range(self) -> tuple[int, int]:
        """The first and the last code of as many bits, in two's complement."""
        half = 2 ** (self.codes.bits - 1)
        return -half, half - 1

    @property
    def scales(self) -> ScaleFormat:
        """The numbers that scales and offsets can be."""
        return SCALES[self.scale_format]

    @property
    def scale_dtype(self) -> torch.dtype:
        """The type that stores scales and offsets of groups."""
        return self.scales.dtype

    @property
    def one_factor(self) -> bool:
        """Whether one float32 factor serves all rows; otherwise each row has its own."""
        return self.scales.one_factor

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
        return dataclasses.replace(
            self, block="channel", scale_format=scale_format, tensor_scale=False
        )

    def bits_per_weight(self, width: int, rows: int | None = None) -> float:
        """Stored bits for each of the `width` entries of a row, scales and offsets included.

        A factor that all rows share counts as that of one of `rows`, or not without their number.
        """
        scales = 0.0
        if self.grouped:
            numbers = self.groups(width) * (1 if self.symmetric else 2)
            scales = numbers * self.scales.bits
        factor = ROW_SCALE_BITS
        if self.one_factor:
            factor = 0 if rows is None else ROW_SCALE_BITS / rows
        return self.codes.bits / self.codes.dim + (scales + factor) / width


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
