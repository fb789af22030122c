"""How a weight of any magnitude becomes blocks of moderate numbers, and how results come together.

Each row is multiplied by a power of two, which is exact, so that the scales of its blocks lie in
the normal range of the format they are stored in; the row's float32 scale takes it off again. Rows
whose plain scales fit keep the factor 1. Scales that are powers of two take it off themselves, and
scales that need a factor for the whole tensor get one.

Shapes: n rows, k columns, g groups of a row, b blocks (n g of them), l entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.rounding.factor import rounded, tensor_factor
from qpass.rounding.grid import Grid, Scales

# entries handled at once: a few float32 copies of them fit the cache of a core
CHUNK = 2**18
# float16 keeps all its bits from 2**-14 to 2**16; the margins are for clipping below, and above
# for offsets outside the block's range
SMALLEST_STEP = 2.0**-11
LARGEST_EXPONENT = 13
LARGEST_WEIGHT = torch.finfo(torch.float32).max
# a scale that serves it is a power of two that float32 has as a normal number
SMALLEST_POWER = 2.0**-120


def row_chunks(weight_nk: Tensor, spec: QuantSpec) -> Iterator[tuple[slice, Tensor]]:
    """Rows in chunks of bounded size; all of them at once where they share a scale or a factor."""
    n, k = weight_nk.shape
    if n * k == 0:
        return
    step = n if spec.block == "tensor" or spec.tensor_scale else max(1, CHUNK // k)
    for at in range(0, n, step):
        rows = slice(at, min(at + step, n))
        yield rows, weight_nk[rows].detach()


def scaled_blocks(rows_nk: Tensor, spec: QuantSpec, grid: Grid) -> tuple[Tensor, Tensor]:
    """Float32 blocks `[b, l]` and the factors `[n]` (`[1]` per tensor) taken out of the rows."""
    n, k = rows_nk.shape
    if spec.tensor_scale:
        return _divided(rows_nk, k // spec.groups(k), grid)
    exact_nk = rows_nk.double()
    if spec.block == "tensor":
        exact_nk = exact_nk.reshape(1, n * k)
    groups = spec.groups(k)
    blocks_ngl = exact_nk.reshape(len(exact_nk), groups, -1)
    # several times faster than aminmax along an axis
    low_ng, high_ng = blocks_ngl.amin(2), blocks_ngl.amax(2)
    largest_n = torch.maximum(-low_ng, high_ng).amax(1)
    _check(largest_n)
    if grid.scales.one_factor:
        # the scales of smaller blocks would be no powers of two that are stored
        tiny_ng = torch.maximum(-low_ng, high_ng) < SMALLEST_POWER * grid.high
        exact_nk = torch.where(tiny_ng.unsqueeze(2), 0.0, blocks_ngl).reshape(exact_nk.shape)
    reach_ng = torch.maximum(-low_ng, high_ng) if grid.symmetric else high_ng - low_ng
    steps_ng = reach_ng / (grid.high if grid.symmetric else grid.high - grid.low)
    smallest_n = torch.where(steps_ng > 0, steps_ng, torch.inf).amin(1)
    exponent_n = torch.frexp(largest_n).exponent - LARGEST_EXPONENT
    plain_n = (smallest_n >= SMALLEST_STEP) & (largest_n < 2.0**LARGEST_EXPONENT)
    # float32 cannot hold smaller factors than its smallest normal number
    exponent_n = torch.where(plain_n, 0, exponent_n.clamp(min=-126))
    values = torch.ldexp(exact_nk, -exponent_n.unsqueeze(1).double()).float()
    factor_n = torch.ldexp(torch.ones_like(exponent_n, dtype=torch.float64), exponent_n)
    return _short(values, blocks_ngl.shape[2]), factor_n


def _divided(rows_nk: Tensor, length: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Blocks in units of the tensor's factor; a chunk at a time, as float64 is large."""
    low, high = rows_nk.aminmax()
    largest = torch.maximum(-low.double(), high.double())
    _check(largest)
    factor = tensor_factor(rows_nk, largest, grid)
    values_nk = torch.empty(rows_nk.shape, dtype=torch.float32, device=rows_nk.device)
    step = max(1, CHUNK // rows_nk.shape[1])
    for values, rows in zip(values_nk.split(step), rows_nk.split(step), strict=True):
        values.copy_(rounded(rows.double() / factor))
    return _short(values_nk, length), largest.new_full((len(rows_nk),), factor)


def _check(largest: Tensor) -> None:
    if not bool((largest <= LARGEST_WEIGHT).all()):
        raise BadInput("the weight has a NaN, an infinity or an entry beyond float32; repair it")


def _short(values: Tensor, length: int) -> Tensor:
    """`[b, l]`: the values in blocks."""
    values_bl = values.reshape(-1, length)
    if len(values_bl) > values_bl.shape[1]:
        # many short blocks: neighbours in memory share an entry's place, which vectorises
        values_bl = values_bl.t().contiguous().t()
    return values_bl


@final
@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A quantized tensor that is being filled, a chunk of rows at a time."""

    spec: QuantSpec
    codes_nk: Tensor
    scales_ng: Tensor
    offsets_ng: Tensor
    factors_n: Tensor

    @staticmethod
    def empty(weight_nk: Tensor, spec: QuantSpec) -> Result:
        n, k = weight_nk.shape
        floats = torch.zeros(n, spec.groups(k), dtype=torch.float32, device=weight_nk.device)
        codes = torch.zeros(n, k, dtype=spec.codes.code_dtype, device=weight_nk.device)
        return Result(
            spec,
            codes,
            floats,
            floats.clone(),
            torch.ones(n, dtype=torch.float32, device=weight_nk.device),
        )

    def put(self, rows: slice, points_bl: Tensor, scales: Scales, factor_n: Tensor) -> None:
        """Fill in `rows`; `points` are those of the format, in any dtype."""
        points_nk = points_bl.reshape(self.codes_nk[rows].shape).to(torch.float32)
        self.codes_nk[rows] = self.spec.codes.encode(points_nk)
        scale_ng = scales.scale_b.view(len(factor_n), -1)
        factor_n = factor_n.float()
        if self.spec.one_factor and not self.spec.tensor_scale:
            # powers of two, all three
            scale_ng = scale_ng * factor_n.unsqueeze(1)
            factor_n = torch.ones_like(factor_n)
        self.scales_ng[rows] = scale_ng
        self.offsets_ng[rows] = scales.offset_b.view(len(factor_n), -1)
        self.factors_n[rows] = factor_n

    def finish(self) -> QuantizedTensor:
        spec = self.spec
        if not spec.grouped:
            return QuantizedTensor(spec, self.codes_nk, self.scales_ng[:, 0] * self.factors_n)
        return QuantizedTensor(
            spec,
            self.codes_nk,
            self.factors_n,
            spec.scales.stored(self.scales_ng).to(spec.scale_dtype),
            None if spec.symmetric else self.offsets_ng.to(spec.scale_dtype),
        )
