"""What a rounding method is: how a weight becomes codes of a given grid."""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.registry import Registry


class Statistic(enum.Enum):
    """What calibration measures of a product `y = x @ w.T`; `x [tokens, k]`, `y [tokens, n]`.

    `x` are the inputs that the product will see: those of the model as it is quantized so far. All
    sums run over the same tokens, and tokens may be weighted, each alike in every sum.
    """

    HESSIAN = "x.T @ x, float64 [k, k]"
    HELD_HESSIAN = "x.T @ x of a fixed half of the samples, float64 [k, k]: a part of HESSIAN"
    CROSS = "x_float.T @ x, float64 [k, k]; x_float are the same inputs in the float model"
    HELD_CROSS = "x_float.T @ x of the same half as HELD_HESSIAN: a part of CROSS"
    OUTPUT_HESSIAN = "g.T @ g, float64 [n, n]; g are the gradients of the model's loss to y"
    SAMPLES = "some hundreds of rows of x, the same ones each time, float32 [rows, k]"


Stats = Mapping[Statistic, Tensor]


class Rounding(abc.ABC):
    """A method that chooses scales and codes; deterministic, and the same for equal arguments."""

    name: str
    needs: frozenset[Statistic]

    @abc.abstractmethod
    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        """Quantize a finite floating `[n, k]` weight of any dtype, which is not written to."""


ROUNDINGS: Registry[Rounding] = Registry("rounding", "qpass.rounding")


def without_data(rounding: str) -> str:
    """What stands in for a rounding where nothing was measured: itself if it needs nothing."""
    return "nearest" if ROUNDINGS[rounding].needs else rounding


def round_parts(
    method: Rounding, parts_nk: Iterable[Tensor], spec: QuantSpec, stats: Stats
) -> QuantizedTensor:
    """Quantize a weight that is given some rows after the other.

    They are rounded as they come where no row depends on the others.
    """
    shared = spec.block == "tensor" or spec.tensor_scale
    if shared or Statistic.OUTPUT_HESSIAN in method.needs:
        every = list(parts_nk)
        return method.round(every[0] if len(every) == 1 else torch.cat(every), spec, stats)
    return QuantizedTensor.joined([method.round(part, spec, stats) for part in parts_nk])


def check_weight(weight_nk: Tensor, spec: QuantSpec) -> None:
    """Raise BadInput unless `weight` can take `spec`."""
    if (why := spec.supports(weight_nk.shape)) is not None:
        raise BadInput(f"weight {why}; quantize it per channel, or leave it float")
    if not weight_nk.is_floating_point():
        raise BadInput(f"weight has dtype {weight_nk.dtype}; only floating weights are quantized")
    if spec.dynamic:
        raise BadInput("dynamic scales are for activations; a weight's scales are stored")


def measured(stats: Stats, statistic: Statistic, width: int, rows: int | None = None) -> Tensor:
    """A checked `[rows, width]` statistic; `rows` is None for any number of them."""
    if (found := stats.get(statistic)) is None:
        raise BadInput(f"{statistic.name} is missing: pass calibration data")
    if found.dim() != 2 or found.shape[1] != width or rows not in (None, found.shape[0]):
        raise BadInput(
            f"{statistic.name} has shape {tuple(found.shape)}, expected "
            f"[{rows or 'rows'}, {width}]: it was measured at another product"
        )
    if not bool(found.isfinite().all()):
        raise BadInput(
            f"{statistic.name} has a NaN or an infinity: the calibration data or the model "
            "overflows; run the model in float32 on it"
        )
    return found.detach()
