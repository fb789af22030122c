"""How activations become the numbers that a dynamic format has, as floats.

The reference of the formats that no kernel multiplies by: the product that follows is one of
floats. Symmetric integers with one scale for each row have kernels; see `quantize_rows`.
"""

# M rows, G groups of a row, L entries of a group

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import Format, Integers, QuantSpec, ScaleFormat, wide
from qpass.ops.hadamard import transformed
from qpass.ops.library import define
from qpass.ops.quantize import SMALLEST_ROW, integer_rows, quantize_rows


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> Tensor:
    """The rows of `x`, rounded to a dynamic `spec`, in float32 (float64 for float64).

    Blocks run along the last axis. A block's scale is its largest magnitude over that of the
    format; where a format or its scales leave a choice (a power of two that clips or one that does
    not, the largest point or the second largest for the largest entry) the one with the least
    squared error is taken. `tensor_scale` is a factor for each row. An asymmetric block reaches
    from its smallest entry to its largest. `signs`, `factor` and `power` are those of `hadamard`,
    applied first, in the type of the result. A row with a NaN or an infinity becomes NaN.
    """
    block = spec.block if isinstance(spec.block, int) else 0
    return torch.ops.qpass.fake_quantize.default(
        x, spec.format, block, spec.scale_format, spec.tensor_scale, spec.symmetric,
        signs, factor, power,
    )  # fmt: skip


def as_read(x: Tensor, spec: QuantSpec) -> Tensor:
    """What a product reads instead of `x`, its rows after a dynamic `spec`, in a wide type."""
    if not integer_rows(spec):
        return fake_quantize(x, spec)
    codes, scales = quantize_rows(x, spec.codes.bits)
    return codes * scales


def _specification(
    x: Tensor,
    format: str,
    block: int,
    scale_format: str,
    tensor_scale: bool,
    symmetric: bool,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> Tensor:
    spec = QuantSpec(
        format,
        block or "channel",
        scale_format=scale_format,
        tensor_scale=tensor_scale,
        symmetric=symmetric,
        dynamic=True,
    )
    if (signs is None) != (factor is None):
        raise BadInput("a transform needs both signs and factor; pass both or neither")
    y = x.to(wide(x.dtype))
    if signs is not None and factor is not None:
        y = transformed(y, signs, factor, power)
    n = y.shape[-1]
    if y.numel() == 0:
        return y
    if (why := spec.supports((y.numel() // n, n))) is not None:
        raise BadInput(f"activations: {why}; quantize them per token")
    largest = y.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    y = torch.where(finite & (largest >= SMALLEST_ROW), y, 0.0)
    blocks_mgl = y.reshape(y.numel() // n, spec.groups(n), -1)
    if not symmetric:
        values = _asymmetric(blocks_mgl, spec.codes, spec.scales)
    elif tensor_scale:
        top = spec.codes.high * spec.scales.top
        factor_m11 = blocks_mgl.abs().amax((1, 2), keepdim=True) / top
        factor_m11 = torch.where(factor_m11 > 0, factor_m11, 1.0)
        values = _symmetric(blocks_mgl / factor_m11, spec.codes, spec.scales) * factor_m11
    else:
        values = _symmetric(blocks_mgl, spec.codes, spec.scales)
    return torch.where(finite, values.reshape(y.shape), torch.nan)


def rounded_blocks(
    blocks_mgl: Tensor, points: Format, scales: ScaleFormat
) -> tuple[Tensor, Tensor]:
    """Points `[M, G, L]` and the scales `[M, G, 1]` under which they are nearest to the blocks."""
    extreme_mg1 = blocks_mgl.abs().amax(-1, keepdim=True)
    tops = [points.high]
    if not isinstance(points, Integers):
        tops.append(points.magnitudes[1])
    found: list[Tensor] = []
    for top in tops:
        scale_mg1 = (extreme_mg1 / top).clamp(max=scales.top)
        if scales.one_factor:
            found += [scales.stored_below(scale_mg1), scales.stored_above(scale_mg1)]
        else:
            found.append(scales.stored(scale_mg1))
    best_mg1, *others = found
    best = _nearest(blocks_mgl, points, best_mg1)
    if not others:
        return best, best_mg1
    error_mg1 = _error(best * best_mg1, blocks_mgl)
    for scale_mg1 in others:
        other = _nearest(blocks_mgl, points, scale_mg1)
        other_mg1 = _error(other * scale_mg1, blocks_mgl)
        better = other_mg1 < error_mg1
        best = torch.where(better, other, best)
        best_mg1 = torch.where(better, scale_mg1, best_mg1)
        error_mg1 = torch.minimum(error_mg1, other_mg1)
    return best, best_mg1


def _symmetric(blocks_mgl: Tensor, points: Format, scales: ScaleFormat) -> Tensor:
    best, scale_mg1 = rounded_blocks(blocks_mgl, points, scales)
    return best * scale_mg1


def _nearest(blocks_mgl: Tensor, points: Format, scale_mg1: Tensor) -> Tensor:
    safe_mg1 = torch.where(scale_mg1 == 0, torch.inf, scale_mg1)
    return points.round_(blocks_mgl / safe_mg1)


def _rounded(blocks_mgl: Tensor, points: Format, scale_mg1: Tensor) -> Tensor:
    return _nearest(blocks_mgl, points, scale_mg1) * scale_mg1


def _error(values_mgl: Tensor, blocks_mgl: Tensor) -> Tensor:
    return (values_mgl - blocks_mgl).square().sum(-1, keepdim=True)


def _asymmetric(blocks_mgl: Tensor, points: Format, scales: ScaleFormat) -> Tensor:
    low_mg1, high_mg1 = blocks_mgl.aminmax(dim=-1, keepdim=True)
    step_mg1 = (high_mg1 - low_mg1) / (points.high - points.low)
    scale_mg1 = scales.stored(step_mg1.clamp(max=scales.top))
    offset_mg1 = low_mg1 - scale_mg1 * points.low
    offset_mg1 = scales.stored(offset_mg1.clamp(-scales.top, scales.top))
    return _rounded(blocks_mgl - offset_mg1, points, scale_mg1) + offset_mg1


def _shapes(
    x: Tensor,
    format: str,
    block: int,
    scale_format: str,
    tensor_scale: bool,
    symmetric: bool,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> Tensor:
    return x.new_empty(x.shape, dtype=wide(x.dtype))


define(
    "fake_quantize(Tensor x, str format, int block, str scale_format, bool tensor_scale,"
    " bool symmetric, Tensor? signs=None, Tensor? factor=None, int power=1) -> Tensor",
    _specification,
    _shapes,
)
