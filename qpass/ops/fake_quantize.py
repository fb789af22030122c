"""How activations become the numbers that a format has, as floats.

The reference of the formats that no kernel multiplies by: the product that follows is one of
floats. Integers with one scale for each row are multiplied as such; see `quantize_rows`.
"""

# M rows, G groups of a row, L entries of a group

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from qpass.errors import BadInput
from qpass.formats import Format, Integers, QuantSpec, ScaleFormat, spanning, wide
from qpass.ops.library import define
from qpass.ops.quantize import SMALLEST_ROW, as_integers, integer_rows, turned


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> Tensor:
    """The rows of `x`, rounded to `spec`, in float32 (float64 for float64).

    Blocks run along the last axis. A block's scale is its largest magnitude over that of the
    format; where a format or its scales leave a choice (a power of two that clips or one that does
    not, the largest point or the second largest for the largest entry) the one with the least
    squared error is taken. `tensor_scale` is a factor for each row. An asymmetric block reaches
    from its smallest entry to its largest; `clip` shortens every reach. A static spec has its scale
    and the code of zero. `signs`, `factor` and `power` are those of `hadamard`, applied first, in
    the type of the result. A row with a NaN or an infinity becomes NaN.
    """
    operator, arguments = fake_call(spec)
    return operator(x, *arguments, signs, factor, power)


def fake_call(spec: QuantSpec) -> tuple[OpOverload, tuple[str | int | float | bool, ...]]:
    """The operator that rounds activations to `spec`, and its arguments behind `x`.

    A transform comes behind these. Raises BadInput for a static spec without a scale.
    """
    if spec.static:
        if spec.scale is None:
            raise BadInput("activations: a static scale is missing; calibrate, or give the scale")
        kind = (spec.format, spec.scale, spec.zero, spec.symmetric)
        return torch.ops.qpass.fake_quantize.static, kind
    block = spec.block if isinstance(spec.block, int) else 0
    kind = (spec.format, block, spec.scale_format, spec.tensor_scale, spec.symmetric)
    if spec.clip != 1:
        return torch.ops.qpass.fake_quantize.clipped, (*kind, spec.clip)
    return torch.ops.qpass.fake_quantize.default, kind


def as_read(x: Tensor, spec: QuantSpec) -> Tensor:
    """What a product reads instead of `x`, its rows after `spec`, in a wide type.

    Before a static scale is known, the one that `x` itself would have stands for it.
    """
    if spec.static and spec.scale is None:
        spec = spanning(spec, *(float(end) for end in x.aminmax())) if x.numel() else spec
    if x.numel() == 0:
        return x.to(wide(x.dtype))
    if not integer_rows(spec):
        return fake_quantize(x, spec)
    codes, scales, offsets = as_integers(x, spec)
    return codes * scales if offsets is None else codes * scales + offsets


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
    kind = (format, block, scale_format, tensor_scale, symmetric)
    return _clipped(x, *kind, 1.0, signs, factor, power)


def _clipped(
    x: Tensor,
    format: str,
    block: int,
    scale_format: str,
    tensor_scale: bool,
    symmetric: bool,
    clip: float,
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
        clip=clip,
    )
    y = turned(x, wide(x.dtype), signs, factor, power)
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
        values = _asymmetric(blocks_mgl, spec)
    elif tensor_scale:
        top = spec.codes.high * spec.scales.top
        factor_m11 = blocks_mgl.abs().amax((1, 2), keepdim=True) / top
        factor_m11 = torch.where(factor_m11 > 0, factor_m11, 1.0)
        values = _symmetric(blocks_mgl / factor_m11, spec) * factor_m11
    else:
        values = _symmetric(blocks_mgl, spec)
    return torch.where(finite, values.reshape(y.shape), torch.nan)


def _static(
    x: Tensor,
    format: str,
    scale: float,
    zero: int,
    symmetric: bool,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> Tensor:
    spec = QuantSpec(format, "tensor", symmetric=symmetric, scale=scale, zero=zero)
    y = turned(x, wide(x.dtype), signs, factor, power)
    step = torch.full((), scale, dtype=y.dtype, device=y.device)
    finite = y.isfinite().all(-1, keepdim=True)
    steps = torch.where(finite, y, 0.0) / step
    if spec.integers:
        first, last = spec.whole_range
        points = steps.round().clamp(first - zero, last - zero)
    else:
        points = spec.codes.round_(steps)
    return torch.where(finite, points * step, torch.nan)


def rounded_blocks(
    blocks_mgl: Tensor, points: Format, scales: ScaleFormat, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Points `[M, G, L]` and the scales `[M, G, 1]` under which they are nearest to the blocks.

    `clip` shortens the reach of each block.
    """
    extreme_mg1 = blocks_mgl.abs().amax(-1, keepdim=True) * clip
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


def _symmetric(blocks_mgl: Tensor, spec: QuantSpec) -> Tensor:
    best, scale_mg1 = rounded_blocks(blocks_mgl, spec.codes, spec.scales, spec.clip)
    return best * scale_mg1


def _nearest(blocks_mgl: Tensor, points: Format, scale_mg1: Tensor) -> Tensor:
    safe_mg1 = torch.where(scale_mg1 == 0, torch.inf, scale_mg1)
    return points.round_(blocks_mgl / safe_mg1)


def _rounded(blocks_mgl: Tensor, points: Format, scale_mg1: Tensor) -> Tensor:
    return _nearest(blocks_mgl, points, scale_mg1) * scale_mg1


def _error(values_mgl: Tensor, blocks_mgl: Tensor) -> Tensor:
    return (values_mgl - blocks_mgl).square().sum(-1, keepdim=True)


def _asymmetric(blocks_mgl: Tensor, spec: QuantSpec) -> Tensor:
    points, scales = spec.codes, spec.scales
    low_mg1, high_mg1 = (end * spec.clip for end in blocks_mgl.aminmax(dim=-1, keepdim=True))
    step_mg1 = (high_mg1 - low_mg1) / (points.high - points.low)
    scale_mg1 = scales.stored(step_mg1.clamp(max=scales.top))
    offset_mg1 = low_mg1 - scale_mg1 * points.low
    offset_mg1 = scales.stored(offset_mg1.clamp(-scales.top, scales.top))
    return _rounded(blocks_mgl - offset_mg1, points, scale_mg1) + offset_mg1


def _shapes(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=wide(x.dtype))


_KIND = "str format, int block, str scale_format, bool tensor_scale, bool symmetric"
_TURN = "Tensor? signs=None, Tensor? factor=None, int power=1"

define(f"fake_quantize(Tensor x, {_KIND}, {_TURN}) -> Tensor", _specification, _shapes)
define(
    f"fake_quantize.clipped(Tensor x, {_KIND}, float clip, {_TURN}) -> Tensor", _clipped, _shapes
)
define(
    f"fake_quantize.static(Tensor x, str format, float scale, int zero, bool symmetric, {_TURN})"
    " -> Tensor",
    _static,
    _shapes,
)
