"""What a rounding method is: how a weight becomes codes of a given grid."""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping

from torch import Tensor

from qpass.errors import BadInput
from qpass.formats import QuantizedTensor, QuantSpec
from qpass.registry import Registry


class Statistic(enum.Enum):
    """What calibration measures of a layer's inputs `x`, `[tokens, k]`."""

    HESSIAN = "x.T @ x, float64 [k, k]"


Stats = Mapping[Statistic, Tensor]


class Rounding(abc.ABC):
    """A method that chooses scales and codes; deterministic, and the same for equal arguments."""

    name: str
    needs: frozenset[Statistic]

    @abc.abstractmethod
    def round(self, weight_nk: Tensor, spec: QuantSpec, stats: Stats) -> QuantizedTensor:
        """Quantize a finite floating `[n, k]` weight of any dtype, which is not written to."""


ROUNDINGS: Registry[Rounding] = Registry("rounding", "qpass.rounding")


def check_weight(weight_nk: Tensor, spec: QuantSpec) -> None:
    """Raise BadInput unless `weight` can take `spec`."""
    if (why := spec.supports(weight_nk.shape)) is not None:
        raise BadInput(f"weight {why}; quantize it per channel, or leave it float")
    if not weight_nk.is_floating_point():
        raise BadInput(f"weight has dtype {weight_nk.dtype}; only floating weights are quantized")
    if spec.dynamic:
        raise BadInput("dynamic scales are for activations; a weight's scales are stored")
