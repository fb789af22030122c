"""What a quantized tensor reads as, exactly, with gradients that pass its rounding."""

# n rows, k columns, b blocks, l entries of a block

from __future__ import annotations

from typing import Any

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
            y_bl = y.reshape(-1, _length(x, spec))
            ends = (y_bl.amin(-1, keepdim=True), y_bl.amax(-1, keepdim=True))
            if spec.symmetric:
                top_b1 = torch.maximum(-ends[0], ends[1])
                ends = (-top_b1, top_b1)
    else:
        y, ends = _stored(given, spec, clip)
    if not x.requires_grad:
        return y
    length = _length(x, spec)
    x_bl, y_bl = x.reshape(-1, length), y.reshape(-1, length)
    low_b1, high_b1 = (None, None) if ends is None else ends
    y_bl = _Rounded.apply(x_bl, y_bl, low_b1, high_b1, spec.symmetric)
    return y_bl.reshape(x.shape)


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
    low_b, high_b = values_bl.amin(1), values_bl.amax(1)
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


class _Rounded(torch.autograd.Function):
    """`y [b, l]` with the gradient to `x [b, l]`: what is no extreme itself moves with them.

    `low_b1` and `high_b1` end each block's grid, where entries may lie beyond it; see `fake`.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x_bl: Tensor,
        y_bl: Tensor,
        low_b1: Tensor | None,
        high_b1: Tensor | None,
        symmetric: bool,
    ) -> Tensor:
        ctx.save_for_backward(x_bl, y_bl, low_b1, high_b1)
        ctx.symmetric = symmetric
        return y_bl.view_as(y_bl)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (grad_bl,) = grads
        x_bl, y_bl, low_b1, high_b1 = ctx.saved_tensors
        if ctx.symmetric:
            at_be = x_bl.abs().argmax(-1, keepdim=True)
            size_b1, signs_e = x_bl.gather(-1, at_be), x_bl.new_tensor([1.0])
        else:
            ends = (x_bl.argmin(-1, keepdim=True), x_bl.argmax(-1, keepdim=True))
            at_be = torch.cat(ends, -1)
            size_b1, signs_e = x_bl.gather(-1, at_be).diff(dim=-1), x_bl.new_tensor([-1.0, 1.0])
        kept_bl, passed_bl = x_bl, grad_bl
        if low_b1 is not None:
            inside_bl = (x_bl >= low_b1) & (x_bl <= high_b1)
            kept_bl, passed_bl = x_bl * inside_bl, grad_bl * inside_bl
        moved_b1 = (grad_bl * (y_bl - kept_bl)).sum(-1, keepdim=True) / _safe(size_b1)
        moved_be = (moved_b1 * signs_e).to(passed_bl.dtype)
        found_bl = passed_bl.scatter_add(-1, at_be, moved_be)
        return found_bl.to(x_bl.dtype), None, None, None, None


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
