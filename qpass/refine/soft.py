"""A quantized weight that gradients can change: where each entry lies, and how long a step is.

Each entry has a place on the line of points; what is read is the nearest point, and the gradient
passes as if it were the place itself (the straight-through estimate). Places start inside the
cells of the codes that were given, as near to the float weight as these cells allow: at first
nothing is read differently, and entries that a rounding moved away from their weights are the
first to move back. Scales and offsets change by factors, and are read as they will be stored.

Shapes: n rows, k columns, g groups of a row, l columns of a group.
"""

from __future__ import annotations

import functools
from typing import cast, final

import torch
from torch import Tensor

from qpass.formats import Format, Integers, QuantizedTensor

# how far into a cell a place starts, of the way from the point to the cell's border
INSIDE = 0.98


@final
class SoftWeight:
    """The weight of a site in training, from its codes and the float weight `[n, k]`.

    It is read in the type `dtype`. `keep` is how far places start from the points of the codes: 1
    as far as their cells allow, 0 not at all. A `relaxed` weight is read at its places themselves,
    which start at the float weight, between the two points around it.
    """

    def __init__(
        self,
        start: QuantizedTensor,
        weight_nk: Tensor,
        dtype: torch.dtype,
        keep: float = 1.0,
        *,
        relaxed: bool = False,
    ) -> None:
        self._start, self._dtype, self._relaxed = start, dtype, relaxed
        groups = 1 if start.group_scales_ng is None else start.group_scales_ng.shape[1]
        n, k = start.shape
        shape = n, groups, k // groups
        if start.group_scales_ng is None:
            self._scale_ng = start.row_scales_n.unsqueeze(1)
            self._factor_n1 = torch.ones_like(self._scale_ng)
        else:
            self._scale_ng = start.group_scales_ng.float()
            self._factor_n1 = start.row_scales_n.unsqueeze(1)
        offsets = start.group_offsets_ng
        self._offset_ng = None if offsets is None else offsets.float()
        codes = start.spec.codes
        point_ngl = codes.decode(start.codes_nk).view(shape)
        want_ngl = (weight_nk.float() / self._factor_n1).view(shape)
        if self._offset_ng is not None:
            want_ngl = want_ngl - self._offset_ng.unsqueeze(2)
        scale_ng1 = self._scale_ng.unsqueeze(2)
        wish_ngl = torch.where(scale_ng1 == 0, 0.0, want_ngl / scale_ng1)
        if relaxed:
            place_ngl = wish_ngl.clamp(codes.low, codes.high)
            self.around = around(place_ngl, codes)
        else:
            low_ngl, high_ngl = self.around = cells(point_ngl, codes)
            place_ngl = torch.lerp(point_ngl, wish_ngl.clamp(low_ngl, high_ngl), INSIDE * keep)
        self.place_ngl = place_ngl.requires_grad_()
        self.stretch_ng = torch.zeros_like(self._scale_ng).requires_grad_()
        self.shift_ng = torch.zeros_like(self._scale_ng).requires_grad_()

    @property
    def scales(self) -> list[Tensor]:
        """What changes the scales, and the offsets if there are any."""
        return [self.stretch_ng, *([] if self._offset_ng is None else [self.shift_ng])]

    def value(self) -> Tensor:
        """`[n, k]`: what the codes are read as, with gradients."""
        scale_ng, offset_ng = self._stored()
        point_ngl = self.place_ngl
        if not self._relaxed:
            point_ngl = cast("Tensor", _Nearest.apply(point_ngl, self._start.spec.codes))
        value_ngl = point_ngl * scale_ng.unsqueeze(2)
        if offset_ng is not None:
            value_ngl = value_ngl + offset_ng.unsqueeze(2)
        return (value_ngl.view(self._start.shape) * self._factor_n1).to(self._dtype)

    def settle(self) -> None:
        """Read it from now on at the nearest points, as it will be stored."""
        self._relaxed = False

    def codes(self) -> QuantizedTensor:
        """What is stored of it now."""
        start = self._start
        spec = start.spec
        with torch.no_grad():
            scale_ng, offset_ng = self._stored()
            point_nk = spec.codes.round_(self.place_ngl.detach().clone()).view(start.shape)
            codes_nk = spec.codes.encode(point_nk)
            if start.group_scales_ng is None:
                return QuantizedTensor(spec, codes_nk, scale_ng[:, 0].clone())
            offsets = None if offset_ng is None else offset_ng.to(spec.scale_dtype)
            scales = scale_ng.to(spec.scale_dtype)
            return QuantizedTensor(spec, codes_nk, start.row_scales_n, scales, offsets)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets as they will be stored."""
        scale_ng = self._as_stored(self._scale_ng * (1 + self.stretch_ng))
        if self._offset_ng is None:
            return scale_ng, None
        return scale_ng, self._as_stored(self._offset_ng + self.shift_ng * self._scale_ng)

    def _as_stored(self, x_ng: Tensor) -> Tensor:
        spec = self._start.spec
        if spec.block == "tensor":
            x_ng = x_ng[:1].expand_as(x_ng)
        near_ng = spec.scales.stored(x_ng.detach()) if spec.grouped else x_ng.detach()
        return x_ng + (near_ng - x_ng).detach()


class _Nearest(torch.autograd.Function):
    """The nearest point, with the gradient of the place itself."""

    @staticmethod
    def forward(ctx: object, place: Tensor, points: Format) -> Tensor:
        return points.round_(place.clone())

    @staticmethod
    def backward(ctx: object, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def cells(points: Tensor, codes: Format) -> tuple[Tensor, Tensor]:
    """The ends of the intervals that are nearer to each point than to any other; finite."""
    if isinstance(codes, Integers):
        return points - 0.5, points + 0.5
    every = _points(codes).to(points)
    middle = (every[1:] + every[:-1]) / 2
    below = torch.cat((2 * every[:1] - middle[:1], middle))
    above = torch.cat((middle, 2 * every[-1:] - middle[-1:]))
    at = torch.bucketize(points, middle)
    return below[at], above[at]


def around(places: Tensor, codes: Format) -> tuple[Tensor, Tensor]:
    """The last point that is not above each place, and the next one."""
    if isinstance(codes, Integers):
        low = places.floor().clamp(codes.low, codes.high - 1)
        return low, low + 1
    every = _points(codes).to(places)
    at = (torch.bucketize(places, every, right=True) - 1).clamp(0, len(every) - 2)
    return every[at], every[at + 1]


@functools.cache
def _points(codes: Format) -> Tensor:
    """Every point of a format of single numbers, in order."""
    found = codes.decode(codes.codes()).float().reshape(-1)
    return found[found.isfinite()].unique()
