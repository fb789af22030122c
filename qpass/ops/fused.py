"""Products that make the codes they read: what stands in front of a linear, in one pass over rows.

Each is, step by step, the operators of PyTorch in front of `quantize_rows`, and `linear.codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from qpass.errors import BadInput
from qpass.ops.library import define, specification
from qpass.ops.linear import WEIGHT


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


# by the numbers that operators take: their order is that of `kernel.hpp`
GATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": _gelu_tanh,
        "relu": functional.relu,
    }
)


def linear_rows(
    x: Tensor, bits: int, signs: Tensor | None, factor: Tensor | None, power: int, *weight: object
) -> Tensor:
    """`linear.codes` of `quantize_rows(x, bits, signs, factor, power)` and `weight`."""
    codes, scales = specification("quantize_rows")(x, bits, signs, factor, power)
    return specification("linear.codes")(codes, scales, *weight, x.dtype)


def norm(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, centred: bool, eps: float
) -> Tensor:
    """The norm of the last axis: LayerNorm where it is `centred`, RMSNorm with a shift if not."""
    width = [x.shape[-1]]
    if centred:
        return functional.layer_norm(x, width, scale, shift, eps)
    y = functional.rms_norm(x, width, scale, eps)
    return y if shift is None else y + shift


def linear_normed(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centred: bool,
    eps: float,
    *product: object,
) -> Tensor:
    """`linear_rows` of the norm of `x`."""
    return specification("linear_rows")(norm(x, scale, shift, centred, eps), *product)


def linear_added_normed(
    x: Tensor,
    added: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    centred: bool,
    eps: float,
    *product: object,
) -> tuple[Tensor, Tensor]:
    """`x + added`, and `linear_normed` of it; the two have one shape."""
    if x.shape != added.shape or x.dtype != added.dtype:
        raise BadInput("linear_added_normed: both terms have one shape and type")
    total = (x + added).contiguous()
    return total, specification("linear_normed")(total, scale, shift, centred, eps, *product)


def linear_gated(x: Tensor, by: Tensor | None, gate: int, *product: object) -> Tensor:
    """`linear_rows` of `gate(x)`, times `by` where it is given; `gate` counts in `GATES`."""
    if not 0 <= gate < len(GATES):
        raise BadInput(f"linear_gated: there is no gate {gate}; there are {len(GATES)}")
    if by is not None and (by.shape != x.shape or by.dtype != x.dtype):
        raise BadInput("linear_gated: the gate and what it multiplies have one shape and type")
    y = tuple(GATES.values())[gate](x)
    return specification("linear_rows")(y if by is None else y * by, *product)


def _out(x: Tensor, *rest: object) -> Tensor:
    # the schema ends in the sizes of the weight
    return x.new_empty((*x.shape[:-1], rest[-1]))  # type: ignore[arg-type]


def _sum_and_out(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _out(x, *rest)


_PRODUCT = f"int act_bits, Tensor? signs, Tensor? factor, int power, {WEIGHT}"
_NORM = "Tensor? norm_scale, Tensor? norm_shift, bool centred, float eps"

define(f"linear_rows(Tensor x, {_PRODUCT}) -> Tensor", linear_rows, _out)
define(f"linear_normed(Tensor x, {_NORM}, {_PRODUCT}) -> Tensor", linear_normed, _out)
define(
    f"linear_added_normed(Tensor x, Tensor added, {_NORM}, {_PRODUCT}) -> (Tensor, Tensor)",
    linear_added_normed,
    _sum_and_out,
)
define(f"linear_gated(Tensor x, Tensor? by, int gate, {_PRODUCT}) -> Tensor", linear_gated, _out)

# what a graph calls
LINEAR_ROWS = torch.ops.qpass.linear_rows.default
LINEAR_NORMED = torch.ops.qpass.linear_normed.default
LINEAR_ADDED_NORMED = torch.ops.qpass.linear_added_normed.default
LINEAR_GATED = torch.ops.qpass.linear_gated.default
