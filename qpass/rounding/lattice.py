"""Which blocks already lie on the grid, as weights that were quantized before do.

Their scales and codes are recovered, and rounding them again changes nothing: a checkpoint in a
block format (`w = d q + m` with float16 `d` and `m`) keeps its numbers. A block on the grid spans a
whole number of steps, so its range divided by that number is the scale it was made with, up to
float32 noise that rounding to the stored precision removes.

Shapes: b blocks, l entries of a block, p of them probed, c blocks that are still candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.rounding.grid import Grid, Scales, columns, nearest_codes

PROBED = 8
# float32 rounding of a value, of its block's ends and of the division, each half a unit, doubled
NOISE = 2.0**-21
# beyond this fraction of a step, noise and lattice look alike
COARSEST = 0.125
# blocks that use few of many levels are not searched for every possible step and first level
LONGEST_PARTIAL_SPAN = 15


def on_grid(values_bl: Tensor, grid: Grid) -> tuple[Scales, Tensor]:
    """Scales, and for which blocks `[b]` they give every value to the last bit of float32."""
    low_b, high_b = values_bl.aminmax(dim=1)
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

    def spaced(self, base_b: Tensor, step_b: Tensor) -> Tensor:
        """The blocks left whose probed entries are whole steps away from `base`, `[c]`."""
        steps_bp = (self.probe_bp - base_b.unsqueeze(1)) / step_b.unsqueeze(1)
        limit_b = NOISE * self.ends_b2.abs().amax(1) / step_b.abs()
        off_b = (steps_bp - steps_bp.round()).abs().amax(1)
        # a step of zero makes NaN here, which compares as false
        return (~self.done_b & (off_b <= limit_b) & (limit_b <= COARSEST)).nonzero().squeeze(1)

    def offer(self, at_c: Tensor, trial: Scales) -> None:
        """Keep `trial` for those of the blocks `at` that it reproduces and that are left."""
        if len(at_c) == 0:
            return
        fits_c = ~self.done_b[at_c] & _reproduces(self.ends_b2[at_c], self.grid, trial)
        at_c, trial = at_c[fits_c], trial.at(fits_c)
        fits_c = _reproduces(self.values_bl[at_c], self.grid, trial)
        at_c, trial = at_c[fits_c], trial.at(fits_c)
        self.scales.scale_b[at_c] = trial.scale_b
        self.scales.offset_b[at_c] = trial.offset_b
        self.done_b[at_c] = True


def _try_symmetric(found: _Found, extreme_b: Tensor) -> None:
    grid, zero_b = found.grid, torch.zeros_like(extreme_b)
    found.done_b |= extreme_b == 0
    # only the side with more levels can reach below -high, and it may be either side of zero
    for span in (*range(grid.high, 0, -1), *range(-grid.high - 1, grid.low - 1, -1)):
        step_b = (extreme_b.abs() if span > 0 else extreme_b) / span
        at_c = found.spaced(zero_b, step_b)
        for scale_c in _neighbours(grid.stored(step_b[at_c]), grid):
            found.offer(at_c, Scales(scale_c, zero_b[at_c]))


def _try_asymmetric(found: _Found, low_b: Tensor, high_b: Tensor) -> None:
    grid = found.grid
    _try_constant(found, low_b, high_b)
    levels = grid.high - grid.low
    for span in (levels, *range(min(levels - 1, LONGEST_PARTIAL_SPAN), 0, -1)):
        step_b = (high_b - low_b) / span
        at_c = found.spaced(low_b, step_b)
        scale_c = grid.stored(step_b[at_c])
        for first in range(min(levels - span, LONGEST_PARTIAL_SPAN) + 1):
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
    if grid.dtype == torch.float32:
        yield torch.nextafter(scale_c, torch.full_like(scale_c, torch.inf))
        yield torch.nextafter(scale_c, torch.full_like(scale_c, -torch.inf))


def _reproduces(values_cl: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Which blocks `[c]` the scales give back exactly."""
    same_c = torch.ones_like(scales.scale_b, dtype=torch.bool)
    for part_cl in columns(values_cl):
        codes_cl = nearest_codes(part_cl, grid, scales)
        codes_cl.mul_(scales.scale_b.unsqueeze(1)).add_(scales.offset_b.unsqueeze(1))
        same_c &= (codes_cl == part_cl).all(1)
    return same_c
