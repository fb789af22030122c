"""The least largest error: local search over codes for the worst output of each row.

"Discrete Optimization of Min-Max Violation and its Applications Across Computational Sciences"
(2025) chooses codes that minimise the largest violation `max |X (w - q)|` by local search. Here the
search starts from GPTQ and moves one code at a time to a neighbouring point where that lowers the
largest error on some sample rows of the inputs. Samples are few, and codes that fit them alone lose
on other inputs: all moves of a row together may raise its squared error by `allowance` of what it
was. Checked: no move raises the largest error, and the allowance is kept. The paper's search, which
also moves several codes at once on a GPU, is not reproduced.

Shapes: m sample rows, n rows of the weight, k columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, check_weight, measured
from qpass.rounding.columns import Columns, round_columns
from qpass.rounding.feedback import feed_back
from qpass.rounding.gptq import column_order
from qpass.rounding.grid import nearest_codes
from qpass.rounding.hessian import Curvature, factored, product

# a move must gain this part of the largest error: less is noise of float32
LEAST_GAIN = 1e-4


@final
@dataclass(frozen=True, slots=True)
class MinMax(Rounding):
    name: str = "minmax"
    needs: frozenset[Statistic] = frozenset(
        {Statistic.HESSIAN, Statistic.HELD_HESSIAN, Statistic.SAMPLES}
    )
    sweeps: int = 2
    allowance: float = 0.02

    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        check_weight(weight_nk, spec)
        cost = Curvature.of(stats, weight_nk.shape[1])
        x_mk = sample_rows(stats, weight_nk.shape[1])
        columns = column_order(cost.weights_k, "diagonal", spec)
        factor = factored(cost.h_kk[columns][:, columns])
        order: list[int] = columns.tolist()

        def solve(sheet: Columns) -> Tensor:
            points_kn = feed_back(sheet, factor, order, fit=False)
            return self._lower(sheet, cost.h_kk.float(), x_mk, points_kn)

        return round_columns(weight_nk, spec, cost.weights_k, solve)

    def _lower(self, sheet: Columns, h_kk: Tensor, x_mk: Tensor, points_kn: Tensor) -> Tensor:
        """The points after sweeps of moves that lower the largest error of their row."""
        if x_mk.numel() == 0 or points_kn.numel() == 0:
            return points_kn
        points_kn = points_kn.clone()
        lost_kn = sheet.want_kn - points_kn
        left_n = self.allowance * (product(h_kk, lost_kn) * lost_kn).sum(0)
        codes = sheet.grid.points.codes().to(points_kn.device)
        table = sheet.grid.points.decode(codes).unique(sorted=True)
        for _ in range(self.sweeps):
            error_mn = x_mk @ lost_kn
            largest_n = error_mn.abs().amax(0)
            moved = False
            for column, x_m in enumerate(x_mk.unbind(1)):
                scales = sheet.scales(column // sheet.length)
                now_n = nearest_codes(points_kn[column].unsqueeze(1), sheet.grid, scales).squeeze(1)
                at_n = torch.searchsorted(table, now_n)
                pull_n = product(h_kk[column : column + 1], lost_kn).squeeze(0)
                best_n = torch.zeros_like(now_n)
                for step in (-1, 1):
                    next_n = table[(at_n + step).clamp(0, len(table) - 1)]
                    change_n = (now_n - next_n) * scales.scale_b
                    price_n = change_n * (2 * pull_n + change_n * h_kk[column, column])
                    trial_n = (error_mn + x_m.unsqueeze(1) * change_n).abs_().amax(0)
                    better_n = (trial_n < largest_n * (1 - LEAST_GAIN)) & (price_n <= left_n)
                    best_n = torch.where(better_n, change_n, best_n)
                    largest_n = torch.where(better_n, trial_n, largest_n)
                if not bool(best_n.any()):
                    continue
                moved = True
                left_n -= best_n * (2 * pull_n + best_n * h_kk[column, column])
                error_mn.addr_(x_m, best_n)
                points_kn[column] -= best_n
                lost_kn[column] += best_n
            if not moved:
                break
        return points_kn


def sample_rows(stats: Stats, width: int) -> Tensor:
    """Checked float32 rows `[m, width]` of the inputs, of magnitude one."""
    found = measured(stats, Statistic.SAMPLES, width)
    largest = float(found.abs().max()) if found.numel() else 0.0
    return found.float() / (largest if largest > 0 else 1.0)


ROUNDINGS.add(MinMax())
