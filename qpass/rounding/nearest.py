"""Nearest rounding: each entry to its nearest point, on the grid with the least squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight
from qpass.rounding.grid import Grid, Scales, nearest_codes
from qpass.rounding.lattice import on_grid
from qpass.rounding.rows import Result, row_chunks, scaled_blocks
from qpass.rounding.search import least_error


@final
@dataclass(frozen=True, slots=True)
class Nearest(Rounding):
    name: str = "nearest"
    needs: frozenset[Statistic] = frozenset()

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        grid = Grid.of(spec)
        result = Result.empty(weight_nk, spec)
        for rows, part in row_chunks(weight_nk, spec):
            values_bl, factors = scaled_blocks(part, spec, grid)
            scales = fit_scales(values_bl, grid)
            result.put(rows, nearest_codes(values_bl, grid, scales), scales, factors)
        return result.finish()


def fit_scales(values_bl: Tensor, grid: Grid) -> Scales:
    """The scales of blocks: those that lose nothing where there are such, else the best found."""
    scales, exact_b = on_grid(values_bl, grid)
    left_c = (~exact_b).nonzero().squeeze(1)
    if len(left_c) == 0:
        return scales
    found = least_error(values_bl[left_c], grid)
    return Scales(
        scales.scale_b.index_put((left_c,), found.scale_b),
        scales.offset_b.index_put((left_c,), found.offset_b),
    )


ROUNDINGS.add(Nearest())
