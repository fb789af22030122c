"""What a quantized weight is: codes, and the scales that turn them into numbers.

Shapes: n rows (what a product writes), k columns (what it sums over), g groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats.spec import QuantSpec


@final
@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """`w[n, k] = row_scales[n] * (group_scales[n, g] * q[n, k] + group_offsets[n, g])`.

    The codes are one to a byte here, whatever their bits. Without group scales the row's scale
    stands alone; with them it is a power of two that keeps them in their format's normal range,
    and 1 where that is not needed; some formats of scales share one factor between all rows, any
    number. Scales may be negative where their format has a sign: an integer grid reaches one step
    further down than up.
    """

    spec: QuantSpec
    codes_nk: Tensor
    row_scales_n: Tensor
    group_scales_ng: Tensor | None = None
    group_offsets_ng: Tensor | None = None

    def __post_init__(self) -> None:
        if (why := self.spec.supports(self.codes_nk.shape)) is not None:
            raise BadInput(f"codes: {why}")
        n, k = self.codes_nk.shape
        groups = (n, self.spec.groups(k))
        offsets = self.spec.grouped and not self.spec.symmetric
        scale_dtype = self.spec.scale_dtype
        _check("codes", self.codes_nk, (n, k), self.spec.codes.code_dtype)
        _check("row scales", self.row_scales_n, (n,), torch.float32)
        if self.spec.one_factor and not bool((self.row_scales_n == self.row_scales_n[:1]).all()):
            raise BadInput("row scales: they differ, but the spec has one for all rows")
        _check("group scales", self.group_scales_ng, groups, scale_dtype, self.spec.grouped)
        _check("group offsets", self.group_offsets_ng, groups, scale_dtype, offsets)

    @staticmethod
    def joined(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """The rows of all parts, at least one, which share a spec without a common factor."""
        if len(parts) == 1:
            return parts[0]

        def rows(of: Callable[[QuantizedTensor], Tensor | None]) -> Tensor | None:
            found = [value for part in parts if (value := of(part)) is not None]
            return torch.cat(found) if found else None

        return QuantizedTensor(
            parts[0].spec,
            torch.cat([part.codes_nk for part in parts]),
            torch.cat([part.row_scales_n for part in parts]),
            rows(lambda part: part.group_scales_ng),
            rows(lambda part: part.group_offsets_ng),
        )

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes_nk.shape
        return n, k

    @property
    def bytes(self) -> int:
        """The bytes that storing it takes: codes packed by row, every scale and offset."""
        n, k = self.shape
        row_bits = k // self.spec.codes.dim * self.spec.codes.bits
        factors = self.row_scales_n[:1] if self.spec.one_factor else self.row_scales_n
        parts = (factors, self.group_scales_ng, self.group_offsets_ng)
        return n * -(-row_bits // 8) + sum(p.nbytes for p in parts if p is not None)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """`[n, k]`: the weight these codes stand for, evaluated in float32 and rounded once."""
        points_nk = self.spec.codes.decode(self.codes_nk)
        if self.group_scales_ng is None:
            return (points_nk * self.row_scales_n.unsqueeze(1)).to(dtype)
        n, k = self.shape
        values = points_nk.view(n, self.group_scales_ng.shape[1], -1)
        values = values * self.group_scales_ng.float().unsqueeze(2)
        if self.group_offsets_ng is not None:
            values += self.group_offsets_ng.float().unsqueeze(2)
        return (values.view(n, k) * self.row_scales_n.unsqueeze(1)).to(dtype)


def _check(
    what: str,
    tensor: Tensor | None,
    shape: tuple[int, int] | tuple[int],
    dtype: torch.dtype,
    wanted: bool = True,
) -> None:
    if (tensor is not None) is not wanted:
        raise BadInput(f"{what}: {'missing' if wanted else 'given, but the spec has none'}")
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{what}: shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype != dtype:
        raise BadInput(f"{what}: {tensor.dtype}, expected {dtype}")
