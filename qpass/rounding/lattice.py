"""Which blocks already lie on the grid, as weights that were quantized before do.

Their scales and codes are recovered, and rounding them again changes nothing: a checkpoint in a
block format (`w = d q + m` with float16 `d` and `m`) keeps its numbers. A block on the grid spans a
whole number of steps, so its range divided by that number is the scale it was made with, up to
float32 noise that rounding to the stored precision removes.

Shapes: b blocks, l entries of a block, p of them probed, c blocks that are still candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rounding.grid import Grid, Scales, columns, nearest_points

PROBED = 8
# float32 rounding of a value, of its block's ends and of the division, each half a unit, doubled
NOISE = 2.0**-21
# beyond this fraction of a step, noise and lattice look alike
COARSEST = 0.125
# blocks that use few of many levels are not searched for every possible step and first level
LONGEST_PARTIAL_SPAN = 15


def on_grid(values_bl: Tensor, grid: Grid) -> tuple[Scales, Tensor]:
    """Scales, and for which blocks `[b]` they give every value to the last bit of float32."""
    low_b, high_b = values_bl.amin(1), values_bl.amax(1)
    found = _Found(
        values_bl,
        values_bl[:, :: max(1, values_bl.shape[1] // PROBED)][:, :PROBED],
        torch.stack((low_b, high_b), dim=1),
        grid,
        Scales(torch.zeros_like(low_b), torch.zeros_like(low_b)),
        torch.zeros_like(low_b, dtype=torch.bool),
    )
    if grid.symmetric:
        _try_symmetric(found, torch.where(-low_b > high_b, low_b, high_b))
    else:
        _try_asymmetric(found, low_b, high_b)
    return found.scales, found.done_b


@final
@dataclass(slots=True, eq=False)
class _Found:
    """Which blocks have been recovered so far, and with which scales."""

    values_bl: Tensor
    probe_bp: Tensor
    ends_b2: Tensor
    grid: Grid
    scales: Scales
    done_b: Tensor

    def candidates(
        self, base_b: Tensor, range_b: Tensor, spans: Sequence[float]
    ) -> Iterator[tuple[float, Tensor]]:
        """Each of `spans` with the blocks `[c]` left that may have that many steps in their range.

        Those are the blocks whose probed entries are whole steps away from `base`, or points of
        uneven formats. The first span is tried alone: blocks on the grid mostly use all of it.
        """
        for some in (spans[:1], spans[1:]):
            left_c = (~self.done_b).nonzero().squeeze(1)
            if len(left_c) == 0 or len(some) == 0:
                return
            fits_cs = self._spaced(left_c, base_b[left_c], range_b[left_c], some)
            for index in fits_cs.any(0).nonzero().squeeze(1).tolist():
                yield some[index], left_c[fits_cs[:, index]]

    def _spaced(
        self, left_c: Tensor, base_c: Tensor, range_c: Tensor, spans: Sequence[float]
    ) -> Tensor:
        spans_s = torch.tensor(spans, dtype=torch.float32, device=range_c.device)
        steps_cs = spans_s / range_c.unsqueeze(1)
        limit_cs = NOISE * steps_cs.abs() * self.ends_b2[left_c].abs().amax(1, keepdim=True)
        # a range of zero makes NaN in what follows, which compares as false
        fits_cs = limit_cs <= COARSEST
        for entry_c in (self.probe_bp[left_c] - base_c.unsqueeze(1)).unbind(1):
            at_cs = steps_cs * entry_c.unsqueeze(1)
            near_cs = at_cs.round() if self.grid.even else self.grid.points.round_(at_cs.clone())
            fits_cs &= (at_cs - near_cs).abs_() <= limit_cs
        return fits_cs

    def offer(self, at_c: Tensor, trial: Scales) -> None:
        """Keep `trial` for those of the blocks `at` that it reproduces and that are left."""
        fits_c = ~self.done_b[at_c]
        for values_bl in (self.ends_b2, self.values_bl):
            if not bool(fits_c.any()):
                return
            if not bool(fits_c.all()):
                at_c, trial = at_c[fits_c], trial.at(fits_c)
            chosen_cl = values_bl if len(at_c) == len(values_bl) else values_bl[at_c]
            fits_c = _reproduces(chosen_cl, self.grid, trial)
        at_c, trial = at_c[fits_c], trial.at(fits_c)
        self.scales.scale_b[at_c] = trial.scale_b
        self.scales.offset_b[at_c] = trial.offset_b
        self.done_b[at_c] = True


def _try_symmetric(found: _Found, extreme_b: Tensor) -> None:
    grid, zero_b = found.grid, torch.zeros_like(extreme_b)
    found.done_b |= extreme_b == 0
    for span, at_c in found.candidates(zero_b, extreme_b, grid.points.magnitudes):
        # only the side with one more level reaches beyond high; it may face either way
        step_c = extreme_b[at_c].abs() / span if span <= grid.high else -extreme_b[at_c] / span
        for scale_c in _neighbours(grid.stored(step_c), grid):
            found.offer(at_c, Scales(scale_c, zero_b[at_c]))


def _try_asymmetric(found: _Found, low_b: Tensor, high_b: Tensor) -> None:
    grid = found.grid
    _try_constant(found, low_b, high_b)
    levels = int(grid.high - grid.low)
    spans = (levels, *range(min(levels - 1, LONGEST_PARTIAL_SPAN), 0, -1))
    for span, at_c in found.candidates(low_b, high_b - low_b, spans):
        scale_c = grid.stored((high_b[at_c] - low_b[at_c]) / span)
        for first in range(min(levels - int(span), LONGEST_PARTIAL_SPAN) + 1):
            offset_c = grid.stored(low_b[at_c] - scale_c * (grid.low + first))
            found.offer(at_c, Scales(scale_c, offset_c))


def _try_constant(found: _Found, low_b: Tensor, high_b: Tensor) -> None:
    """A block of one value: the offset holds its leading bits and one step the rest."""
    grid = found.grid
    at_c = (low_b == high_b).nonzero().squeeze(1)
    offset_c = grid.stored_below(low_b[at_c])
    found.offer(at_c, Scales(grid.stored(low_b[at_c] - offset_c), offset_c))


def _neighbours(scale_c: Tensor, grid: Grid) -> Iterator[Tensor]:
    """The scale, and where float32 noise is not rounded away the numbers next to it."""
    yield scale_c
    if grid.scales.dtype == torch.float32:
        yield torch.nextafter(scale_c, torch.full_like(scale_c, torch.inf))
        yield torch.nextafter(scale_c, torch.full_like(scale_c, -torch.inf))


def _reproduces(values_cl: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Which blocks `[c]` the scales give back exactly."""
    same_c = torch.ones_like(scales.scale_b, dtype=torch.bool)
    for part_cl in columns(values_cl):
        same_c &= (nearest_points(part_cl, grid, scales) == part_cl).all(1)
    return same_c
