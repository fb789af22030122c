"""Which float32 factor lies over the scales of a whole tensor.

The scales of blocks then use their format's range, up to its top. A tensor that was made of such
numbers, `w = T (s q)` with a stored scale `s` and a point `q`, keeps the factor `T` that it was
made with: its largest entry divided by one of the few products `s q` that can be the largest.

Shapes: c candidates, p probed entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.rounding.grid import Grid

SAMPLED = 4096
PROBED = 64
# `s q` has at most 4 + 7 significant bits; what is rounded off is the noise of float32 beyond
SIGNIFICANT_BITS = 18
SMALLEST_FACTOR = torch.finfo(torch.float32).tiny


def tensor_factor(weight_nk: Tensor, largest: Tensor, grid: Grid) -> float:
    """The factor of a finite weight whose largest magnitude is the float64 `largest`."""
    if largest == 0:
        return 1.0
    plain = (largest / (grid.high * grid.scales.top)).float().clamp(min=SMALLEST_FACTOR)
    made_c = _candidates(largest, grid)
    # an odd number of steps, so that the entries come from all columns
    some = weight_nk.flatten()[:: max(1, weight_nk.numel() // SAMPLED) | 1].double().abs()
    some = some[some > 0]
    probed_p = torch.cat((largest[None], some[:: max(1, len(some) // PROBED)][:PROBED]))
    products_cp = rounded(probed_p / made_c.double().unsqueeze(1)).float()
    # products of so few bits are rare among arbitrary numbers
    lattice_cp = rounded(products_cp.double(), 4 + _bits(grid)).float() == products_cp
    again_cp = (products_cp * made_c.unsqueeze(1)).double() == probed_p
    fits_c = (lattice_cp & again_cp).all(1) & (made_c >= SMALLEST_FACTOR)
    return float(made_c[fits_c][0] if bool(fits_c.any()) else plain)


def rounded(x: Tensor, bits: int = SIGNIFICANT_BITS) -> Tensor:
    """Float64 numbers with that many significant bits."""
    # Veltkamp's splitting
    spread = x * (2.0 ** (53 - bits) + 1)
    return spread - (spread - x)


def _candidates(largest: Tensor, grid: Grid) -> Tensor:
    """Float32 factors that make `largest` a product of a scale and a point."""
    # a factor twice as large, with scales half as large, is the same: one octave of scales will do
    top, device = grid.scales.top, largest.device
    steps = torch.linspace(top / 2, top, 257, dtype=torch.float64, device=device)
    scales = grid.stored(steps).unique().double()
    points = torch.tensor(grid.points.magnitudes, dtype=torch.float64, device=device)
    products = (scales.unsqueeze(1) * points).flatten().unique().flip(0)
    near = (largest / products).float()
    beside = [torch.nextafter(near, torch.full_like(near, to)) for to in (-torch.inf, torch.inf)]
    return torch.stack([near, *beside], dim=1).flatten()


def _bits(grid: Grid) -> int:
    """The significant bits of a format's points."""
    ratios = [magnitude.as_integer_ratio()[0] for magnitude in grid.points.magnitudes]
    return max((odd // (odd & -odd)).bit_length() for odd in ratios)
