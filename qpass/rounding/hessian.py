"""What changing a row of a weight costs: the quadratic form of the output error, made safe to use.

A change `d [k]` of a row moves the outputs by `x d`, whose squares sum to `d H d` with
`H = sum x x^T`. H comes from finitely many samples: between directions that they hardly saw it is
noise, and roundings that trust it lose on other inputs. Its off-diagonal entries are shrunk
towards zero by the factor that costs least on samples that were held out.

Triangular algebra is made of products and small Cholesky factors, whose bits, unlike those of
larger factors and of triangular solvers, do not depend on the number of threads.

Shapes: k columns of the weight, p probes, r right-hand sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast, final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from qpass.errors import BadInput
from qpass.rounding.base import Statistic, Stats, measured

SHRINKAGES = (0.01, 0.03, 0.1, 0.3)
# used where no samples were held out
DEFAULT_SHRINKAGE = 0.03
# inputs that were (almost) never seen count this much of the mean
QUIETEST = 1e-4
PROBES = 64
BLOCK = 128
# triangles that are inverted by a formula, of a power of two
SMALLEST = 8
FEW = 16
# entries are sums in float64, perhaps of float32 numbers
NOISE = 1e-5
TINIEST = torch.finfo(torch.float64).tiny


def second_moments(stats: Stats, statistic: Statistic, width: int) -> Tensor:
    """A checked `[width, width]` sum of outer products, float64 and exactly symmetric."""
    h_kk = square(stats, statistic, width)
    diagonal_k = h_kk.diagonal()
    # of a positive semi-definite matrix, |h_ij| <= sqrt(h_ii h_jj)
    limit_k = diagonal_k.clamp_min(0).sqrt()
    slack = NOISE * float(diagonal_k.abs().max()) if width else 0.0
    mean_kk = torch.empty_like(h_kk)
    for start in range(0, width, BLOCK):
        rows = slice(start, start + BLOCK)
        across = h_kk[:, rows].T
        if bool(((h_kk[rows] - across).abs_() > slack).any()):
            raise _not(statistic, "symmetric")
        mean_kk[rows] = (h_kk[rows] + across) / 2
        if bool((mean_kk[rows].abs() > limit_k[rows].unsqueeze(1) * limit_k + slack).any()):
            raise _not(statistic, "positive semi-definite")
    return mean_kk


def _not(statistic: Statistic, what: str) -> BadInput:
    return BadInput(f"{statistic.name} is not {what}: it must be a sum {statistic.value}")


def square(stats: Stats, statistic: Statistic, width: int) -> Tensor:
    """A checked `[width, width]` statistic in float64."""
    return measured(stats, statistic, width, rows=width).double()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """`H = U diag(pivots) U^T` with an upper triangular U whose diagonal is 1.

    Rounding columns in order, column i should make up for what the earlier ones lost by
    `sum_{j<i} U_ji` times their losses; what it loses itself then costs `pivots_i`.
    """

    upper_kk: Tensor
    pivots_k: Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """The Hessian of a row as roundings use it: positive definite, float64, of mean diagonal 1.

    `unit` is what it was divided by, `shrinkage` what its off-diagonal entries lost.
    """

    h_kk: Tensor
    shrinkage: float
    unit: float
    _factors: dict[tuple[int, ...], Factor] = field(default_factory=dict[tuple[int, ...], Factor])

    @staticmethod
    def of(stats: Stats, width: int, shrinkage: float | None = None) -> Curvature:
        """That of the statistics; the shrinkage, unless given, is the best for held-out samples.

        Where no samples were held out it is `DEFAULT_SHRINKAGE`. It is made once for equal
        statistics: weights that read one value share it.
        """
        hessian = stats.get(Statistic.HESSIAN)
        if hessian is None:
            return Curvature._of(stats, width, shrinkage)
        held = stats.get(Statistic.HELD_HESSIAN)
        made_of = tuple((WeakIdRef(t), t._version) for t in (hessian, held) if t is not None)
        known = cast("dict[object, Curvature]", _KNOWN.setdefault(hessian, {}))
        key = (made_of, width, shrinkage)
        if key not in known:
            known[key] = Curvature._of(stats, width, shrinkage)
        return known[key]

    @staticmethod
    def _of(stats: Stats, width: int, shrinkage: float | None) -> Curvature:
        h_kk = second_moments(stats, Statistic.HESSIAN, width)
        if Statistic.HELD_HESSIAN in stats and width:
            held_kk = second_moments(stats, Statistic.HELD_HESSIAN, width)
            fit_kk = h_kk - held_kk
            if shrinkage is None:
                shrinkage = best_shrinkage(fit_kk, held_kk)
            h_kk = with_diagonal(h_kk, _smooth(fit_kk.diagonal(), held_kk.diagonal()))
        if shrinkage is None:
            shrinkage = DEFAULT_SHRINKAGE
        unit = float(h_kk.diagonal().mean()) if width else 1.0
        return Curvature(shrunk(h_kk, shrinkage), shrinkage, unit if unit > 0 else 1.0)

    @property
    def weights_k(self) -> Tensor:
        """What an error of each column costs by itself."""
        return self.h_kk.diagonal()

    def factor(self, columns: Tensor) -> Factor:
        """That for the columns in this order."""
        order = tuple(columns.tolist())
        if order not in self._factors:
            self._factors[order] = factored(self.h_kk[columns][:, columns])
        return self._factors[order]


# by the Hessian, with which it is freed
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _smooth(fit_k: Tensor, held_k: Tensor) -> Tensor:
    """The sum of two halves of a diagonal, moved towards its mean by the part that is noise.

    The halves' difference says how much of the spread between columns is (James-Stein).
    """
    sum_k = fit_k + held_k
    mean = sum_k.mean()
    noise = ((fit_k - held_k) / sum_k.clamp_min(TINIEST)).square().mean()
    spread = (sum_k / mean - 1).square().mean()
    return torch.lerp(
        sum_k, mean.expand_as(sum_k), float((noise / spread).nan_to_num(0).clamp(max=1))
    )


def with_diagonal(h_kk: Tensor, diagonal_k: Tensor) -> Tensor:
    """H scaled on both sides to another diagonal, which leaves it positive semi-definite."""
    old_k = h_kk.diagonal()
    scale_k = torch.where(old_k > 0, diagonal_k / old_k.clamp_min(TINIEST), 0.0).sqrt()
    scaled_kk = h_kk * scale_k * scale_k.unsqueeze(1)
    # columns without any input have no entries to scale
    scaled_kk.diagonal().copy_(diagonal_k)
    return scaled_kk


def shrunk(h_kk: Tensor, shrinkage: float) -> Tensor:
    """H with its off-diagonal entries times `1 - shrinkage`, over the mean of its diagonal."""
    diagonal_k = h_kk.diagonal()
    mean = float(diagonal_k.mean()) if len(diagonal_k) else 0.0
    if not mean > 0:
        return torch.eye(len(h_kk), dtype=h_kk.dtype, device=h_kk.device)
    safe_kk = h_kk * ((1 - shrinkage) / mean)
    safe_kk.diagonal().copy_((diagonal_k / mean).clamp_min(QUIETEST))
    return safe_kk


def best_shrinkage(fit_kk: Tensor, held_kk: Tensor) -> float:
    """Which shrinkage of one half of the samples costs least on the other; 1 is no feedback.

    With errors `e` that rounding leaves at each column, independent and of one size, feedback by
    `U` changes the weight by `e U^-1`; that is weighed with the Hessian of the other half.
    """
    k = len(fit_kk)
    generator = torch.Generator().manual_seed(k)
    signs_pk = 2.0 * torch.randint(0, 2, (PROBES, k), generator=generator) - 1
    signs_pk = signs_pk.to(fit_kk.device)
    halves = fit_kk.float(), held_kk.float()
    costs = {1.0: sum(_cost(signs_pk, other) for other in halves)}
    for shrinkage in SHRINKAGES:
        cost = 0.0
        for mine, other in (halves, halves[::-1]):
            factor = factored(shrunk(mine, shrinkage))
            change_kp = solve_unit(factor.upper_kk, signs_pk.t(), transposed=True)
            cost += _cost(change_kp.t(), other)
        costs[shrinkage] = cost
    return min(costs, key=lambda shrinkage: costs[shrinkage])


def _cost(change_pk: Tensor, h_kk: Tensor) -> float:
    return float(((change_pk @ h_kk) * change_pk).double().sum())


def factored(h_kk: Tensor) -> Factor:
    """The factor of a positive definite H for columns in their order."""
    # the Cholesky factor of the reversed matrix, reversed
    root_kk = _cholesky(h_kk.flip(0, 1)).flip(0, 1)
    diagonal_k = root_kk.diagonal().clone()
    return Factor(root_kk / diagonal_k, diagonal_k.square())


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, with a few rows filled up: the bits of small products depend on threads."""
    rows = len(left)
    if rows >= FEW:
        return left @ right
    return (torch.nn.functional.pad(left, (0, 0, 0, FEW - rows)) @ right)[:rows]


def solve_unit(upper_kk: Tensor, given_kr: Tensor, *, transposed: bool = False) -> Tensor:
    """X of `U X = given`, or of `U^T X = given`, for a U of ones on its diagonal."""
    solved_kr = given_kr.clone()
    starts = range(0, len(upper_kk), BLOCK)
    whole = len(upper_kk) // BLOCK
    corners = [upper_kk[s : s + BLOCK, s : s + BLOCK] for s in starts]
    inverses = [*_inverses(torch.stack(corners[:whole]))] if whole else []
    inverses += [_inverses(corner.unsqueeze(0))[0] for corner in corners[whole:]]
    for at in range(len(starts)) if transposed else reversed(range(len(starts))):
        start, inverse = starts[at], inverses[at]
        end = start + BLOCK
        if transposed:
            known = upper_kk[:start, start:end].t() @ solved_kr[:start]
            solved_kr[start:end] = inverse.t() @ (solved_kr[start:end] - known)
        else:
            known = upper_kk[start:end, end:] @ solved_kr[end:]
            solved_kr[start:end] = inverse @ (solved_kr[start:end] - known)
    return solved_kr


def _inverses(upper_btt: Tensor) -> Tensor:
    """The inverses of triangles of ones on their diagonals, from those of their parts."""
    b, t = upper_btt.shape[0], upper_btt.shape[1]
    size = SMALLEST
    while size < t:
        size *= 2
    one = torch.eye(size, dtype=upper_btt.dtype, device=upper_btt.device)
    whole = one.repeat(b, 1, 1)
    whole[:, :t, :t] = upper_btt
    # (1 - V)^-1 = (1 + V)(1 + V^2)(1 + V^4), as V^8 = 0
    one = one[:SMALLEST, :SMALLEST]
    rest = one - _corners(whole, SMALLEST)
    twice = rest @ rest
    inverse = (one + rest) @ (one + twice) @ (one + twice @ twice)
    while inverse.shape[-1] < size:
        half = inverse.shape[-1]
        across = _corners(whole, 2 * half)[:, :half, half:]
        first, second = inverse[::2], inverse[1::2]
        inverse = inverse.new_zeros(len(first), 2 * half, 2 * half)
        inverse[:, :half, :half] = first
        inverse[:, half:, half:] = second
        inverse[:, :half, half:] = -(first @ across @ second)
    return inverse[:, :t, :t]


def _corners(whole_btt: Tensor, size: int) -> Tensor:
    """The blocks along the diagonals, one after another."""
    b, count = whole_btt.shape[0], whole_btt.shape[1] // size
    blocks = whole_btt.reshape(b, count, size, count, size).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2).reshape(b * count, size, size)


def _cholesky(h_kk: Tensor) -> Tensor:
    """The lower triangular root."""
    root_kk = torch.zeros_like(h_kk)
    for start in range(0, len(h_kk), BLOCK):
        end = start + BLOCK
        known = root_kk[start:, :start]
        rest = h_kk[start:, start:end] - known @ known[:BLOCK].T
        corner, failed = torch.linalg.cholesky_ex(rest[:BLOCK])
        if int(failed):
            raise _not(Statistic.HESSIAN, "positive semi-definite")
        root_kk[start:end, start:end] = corner
        # rest corner^-T, with the diagonal taken out of the corner
        diagonal = corner.diagonal()
        inverse = _inverses((corner / diagonal).T.unsqueeze(0))[0]
        root_kk[end:, start:end] = rest[BLOCK:] @ inverse / diagonal
    return root_kk
