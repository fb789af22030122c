"""A weight as methods see it that round one column after the other.

Shapes: k columns, n rows, g groups of a row, l columns of a group, b blocks (n g of them).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.grid import Grid, Scales, nearest_codes, nearest_points
from qpass.rounding.rows import Result, row_chunks, scaled_blocks
from qpass.rounding.weighted import block_weights, fit_weighted

# entries handled at once: every column costs a few calls, however many rows it has
WIDE_CHUNK = 2**25


@final
@dataclass(slots=True, eq=False)
class Columns:
    """Rows, columns first, and the scales of their groups, which may be changed.

    `rows` are those of the weight; `factor_n` are what turns entries into the weight's own. Where
    all rows share their scales (`shared`), these are equal along n.
    """

    rows: slice
    factor_n: Tensor
    want_kn: Tensor
    grid: Grid
    length: int
    shared: bool
    scale_gn: Tensor
    offset_gn: Tensor

    @property
    def groups(self) -> int:
        return len(self.scale_gn)

    def some(self, rows: slice) -> Columns:
        """Some of the rows, counted from the first of these; their scales are these ones'."""
        first = self.rows.start + rows.start
        return Columns(
            slice(first, first + rows.stop - rows.start),
            self.factor_n[rows],
            self.want_kn[:, rows],
            self.grid,
            self.length,
            self.shared,
            self.scale_gn[:, rows],
            self.offset_gn[:, rows],
        )

    def scales(self, group: int) -> Scales:
        return Scales(self.scale_gn[group], self.offset_gn[group])

    def put(self, group: int, scales: Scales) -> None:
        self.scale_gn[group] = scales.scale_b
        self.offset_gn[group] = scales.offset_b

    def nearest(self, column: int, aim_n: Tensor) -> Tensor:
        """The points `[n]` of a column that are nearest to `aim`."""
        scales = self.scales(column // self.length)
        return nearest_points(aim_n.unsqueeze(1), self.grid, scales).squeeze(1)

    def rounded(self) -> Tensor:
        """`[k, n]`: every entry at its nearest point."""
        parts = [
            nearest_points(part_ln.t(), self.grid, self.scales(group)).t()
            for group, part_ln in enumerate(self.want_kn.split(self.length))
        ]
        return torch.cat(parts) if parts else torch.empty_like(self.want_kn)


Solve = Callable[[Columns], Tensor]


def round_columns(
    weight_nk: Tensor, spec: QuantSpec, weights_k: Tensor, solve: Solve
) -> QuantizedTensor:
    """The points `[k, n]` that `solve` finds for chunks of rows, as codes.

    It starts from the scales of least error when columns weigh `weights_k`.
    """
    grid = Grid.of(spec)
    result = Result.empty(weight_nk, spec)
    for rows, part in _wide_chunks(weight_nk, spec):
        n, k = part.shape
        values_bl, factors = scaled_blocks(part, spec, grid)
        scales = fit_weighted(values_bl, block_weights(weights_k.float(), values_bl), grid)
        shared = spec.block == "tensor"
        groups = 1 if shared else spec.groups(k)
        sheet = Columns(
            rows,
            factors.float().expand(n),
            values_bl.reshape(n, k).t().contiguous(),
            grid,
            k // groups,
            shared,
            *(
                t.view(-1, groups).expand(n, -1).t().clone()
                for t in (scales.scale_b, scales.offset_b)
            ),
        )
        points_kn = solve(sheet)
        some = slice(0, 1) if shared else slice(None)
        found = Scales(
            sheet.scale_gn[:, some].t().reshape(-1), sheet.offset_gn[:, some].t().reshape(-1)
        )
        points_bl = points_kn.t().reshape(values_bl.shape)
        result.put(rows, nearest_codes(points_bl, grid, found), found, factors)
    return result.finish()


def _wide_chunks(weight_nk: Tensor, spec: QuantSpec) -> Iterator[tuple[slice, Tensor]]:
    """Neighbouring chunks joined, up to `WIDE_CHUNK` entries."""
    chunks = [rows for rows, _ in row_chunks(weight_nk, spec)]
    most = max(1, WIDE_CHUNK // max(1, weight_nk.shape[1]))
    for _, some in itertools.groupby(chunks, key=lambda rows: rows.start // most):
        joined = list(some)
        rows = slice(joined[0].start, joined[-1].stop)
        yield rows, weight_nk[rows].detach()
