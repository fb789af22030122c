"""What a quantized tensor reads as, exactly, with gradients that pass its rounding."""

# n rows, k columns, b blocks, l entries of a block

from __future__ import annotations

import torch
from torch import Tensor

from qpass.formats import Integers, QuantSpec
from qpass.ops import as_read
from qpass.rounding.grid import Grid, Scales, nearest_points, squared_error
from qpass.rounding.rows import scaled_blocks

# of the largest magnitude: where the last point of a grid may lie
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
# what divides a block of zeros, whose errors are zeros
_TINY = 1e-30
_ONE = torch.ones(1, dtype=torch.float64, device="cpu")


def fake(x: Tensor, spec: QuantSpec, clip: float = 1.0) -> Tensor:
    """`x` as `spec` stores it, in a wide type and with gradients to within its rounding.

    Blocks lie along the last axis. Dynamic rows and those with a static scale are what products
    read. The grid of a weight `[n, k]` ends at `clip` times the extreme of each block. The gradient
    is that of a rounding whose residue is a constant number of steps, so a smaller step is a
    smaller error, and of an end where an entry is clipped.
    """
    given = x.detach()
    if spec.scale is not None:
        y = as_read(given, spec)
        # a scale that stands does not move with what it scales
        return y + (x - given) * _inside(given / spec.scale, spec) if x.requires_grad else y
    if spec.dynamic:
        y, ends = as_read(given, spec), None
        if spec.clip != 1 or not isinstance(spec.codes, Integers):
            ends = y.reshape(-1, _length(x, spec)).aminmax(dim=-1, keepdim=True)
            if spec.symmetric:
                top_b1 = torch.maximum(-ends[0], ends[1])
                ends = (-top_b1, top_b1)
    else:
        y, ends = _stored(given, spec, clip)
    if not x.requires_grad:
        return y
    length = _length(x, spec)
    x_bl, y_bl = x.reshape(-1, length), y.reshape(-1, length)
    return _passed(x_bl, y_bl, ends, symmetric=spec.symmetric).reshape(x.shape)


def best_clip(x: Tensor, spec: QuantSpec) -> float:
    """The one of `CLIPS` that loses least of a weight."""
    x = x.detach()
    return min(CLIPS, key=lambda clip: float((fake(x, spec, clip) - x).square().sum()))


def _stored(w_nk: Tensor, spec: QuantSpec, clip: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A weight on the grid that its extremes give, and the ends `[b, 1]` of each block's grid."""
    grid = Grid.of(spec)
    if spec.scale_format == "float32":
        # such scales need no factors, which are powers of two
        values_bl, factor_n = w_nk.float().reshape(-1, _length(w_nk, spec)), _ONE
    else:
        values_bl, factor_n = scaled_blocks(w_nk, spec, grid)
    low_b, high_b = values_bl.aminmax(dim=1)
    zero_b = torch.zeros_like(low_b)
    if not grid.symmetric:
        scale_b = grid.stored((high_b - low_b) * (clip / (grid.high - grid.low)))
        scales = Scales(scale_b, grid.stored(low_b * clip - scale_b * grid.low))
    elif -grid.low > grid.high and grid.scales.signed:
        # the side with one more level faces the extreme
        extreme_b = torch.where(-low_b > high_b, low_b, high_b)
        scales = Scales(grid.stored(extreme_b * (clip / grid.low)), zero_b)
    else:
        top_b = torch.maximum(-low_b, high_b) * (clip / grid.high)
        scales = Scales(grid.stored(top_b), zero_b)
        if grid.scales.one_factor:
            # far apart: the nearest may clip more than is worth it
            above = Scales(grid.scales.stored_above(top_b), zero_b)
            errors = (squared_error(values_bl, grid, each) for each in (above, scales))
            scales = scales.where(torch.lt(*errors), above)
    factor_b1 = factor_n.repeat_interleave(len(values_bl) // len(factor_n)).unsqueeze(1)
    factor_b1 = factor_b1.to(values_bl.dtype)
    y_bl = nearest_points(values_bl, grid, scales) * factor_b1
    one, other = (
        (scales.scale_b * end + scales.offset_b).unsqueeze(1) * factor_b1
        for end in (grid.low, grid.high)
    )
    return y_bl.reshape(w_nk.shape), (torch.minimum(one, other), torch.maximum(one, other))


def _passed(
    x_bl: Tensor, y_bl: Tensor, ends: tuple[Tensor, Tensor] | None, *, symmetric: bool
) -> Tensor:
    """`y` with the gradient to `x`: what is not an entry itself moves with the extremes."""
    given_bl = x_bl.detach()
    if symmetric:
        size_b1 = x_bl.gather(-1, given_bl.abs().argmax(-1, keepdim=True))
    else:
        low_b1, high_b1 = (given_bl.argmin(-1, keepdim=True), given_bl.argmax(-1, keepdim=True))
        size_b1 = x_bl.gather(-1, high_b1) - x_bl.gather(-1, low_b1)
    if ends is not None:
        inside_bl = (given_bl >= ends[0]) & (given_bl <= ends[1])
        x_bl, given_bl = x_bl * inside_bl, given_bl * inside_bl
    rest_bl = (y_bl - given_bl) / _safe(size_b1.detach())
    return torch.addcmul(x_bl.to(y_bl.dtype), size_b1.to(y_bl.dtype), rest_bl)


def _inside(steps: Tensor, spec: QuantSpec) -> Tensor:
    """Which multiples of a static scale are between its first point and its last."""
    first, last = (-spec.codes.high, spec.codes.high)
    if spec.integers:
        first, last = (end - spec.zero for end in spec.whole_range)
    return (steps >= first) & (steps <= last)


def _safe(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _TINY, 1.0, x)


def _length(x: Tensor, spec: QuantSpec) -> int:
    if spec.block == "tensor":
        return max(1, x.numel())
    return int(x.shape[-1]) if spec.block == "channel" else spec.block
