"""How far a kernel's result may be from its specification's, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass._kernels.gpu.linear_whole import FEWEST_POINTS, FEWEST_ROWS, HALVES
from qpass._kernels.gpu.weights import rows_of
from qpass.ops import BlocksLinear
from qpass.ops.hadamard import transformed
from qpass.runtime.gpu import Call

# of float32 sums in another order, relative to the largest value of a row; the tensor cores' three
# products stand for float32 to about as much
SUMS = 2.0**-20
# the order of a factor up to which that holds
LONG = 64
# two numbers that are close may round to neighbours: a whole unit in the last place
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def disagreement(call: Call, got: Any, want: Any) -> str | None:
    """What is wrong with `got`, or None."""
    return _RULES[call.operator](call, got, want)


def _same_kind(got: Tensor, want: Tensor) -> str | None:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if got.is_floating_point() and not torch.equal(got.isfinite(), want.isfinite()):
        return f"{int((got.isfinite() != want.isfinite()).sum())} results are (not) finite"
    return None


def _rows(got: Tensor, want: Tensor, bound: float) -> str | None:
    """Compare rows by their largest magnitudes."""
    if why := _same_kind(got, want):
        return why
    if not want.numel():
        return None
    g, w = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (got, want))
    size = w.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    apart = float(((g - w).abs() / size).max())
    # written so that NaN is a disagreement
    return (
        None if apart <= bound else f"{apart:.1e} of a row's largest value apart, over {bound:.1e}"
    )


def _turned(call: Call) -> float:
    """The bound of a transform's sums, which grow with the order of its factor."""
    factor = call["factor"]
    return SUMS if factor is None else SUMS * max(1.0, len(factor) / LONG)


def _hadamard(call: Call, got: Tensor, want: Tensor) -> str | None:
    return _rows(got, want, _turned(call) + ROUNDING[want.dtype])


def _quantize_rows(call: Call, got: Any, want: Any) -> str | None:
    (codes, scales), (codes_wanted, scales_wanted) = got, want
    if why := _same_kind(codes, codes_wanted) or _rows(scales, scales_wanted, _turned(call)):
        return why
    off = (codes.int() - codes_wanted.int()).abs()
    if call["factor"] is None:
        return None if not off.any() else f"{int(off.count_nonzero())} codes differ"
    if not off.numel() or int(off.max()) == 0:
        return None
    # a sum in another order moves a code next to a tie
    share = float(off.count_nonzero()) / off.numel()
    most = 2.0 ** call["bits"] * SUMS * 8
    if int(off.max()) > 1 or share > max(most, 1 / off.numel()):
        return f"codes differ by up to {int(off.max())}, {share:.1e} of them, over {most:.1e}"
    return None


def numbers(made: Any, scale_format: str) -> Tensor:
    """What codes, scales of blocks and scales of rows stand for, in float64."""
    codes, scales, rows = made
    m = codes.numel() // codes.shape[-1] if codes.shape[-1] else 0
    flat = BlocksLinear(
        codes.reshape(m, codes.shape[-1]),
        scales.reshape(m, scales.shape[-1]),
        rows.reshape(m),
        scale_format,
    )
    return flat.dequantize(torch.float64)


def _quantize_blocks(call: Call, got: Any, want: Any) -> str | None:
    """The same numbers, or others that are as near to the rows; and that seldom."""
    for mine, his in zip(got[:2], want[:2], strict=True):
        if why := _same_kind(mine, his):
            return why
    if why := _rows(got[2], want[2], SUMS):
        return why
    if not got[0].numel():
        return None
    n, block = call["x"].shape[-1], call["block"]
    x = call["x"].double()
    if call["signs"] is not None:
        signs, factor = call["signs"].double(), call["factor"].double()
        x = transformed(x, signs, factor, call["power"])
    x = x.reshape(-1, n // block, block)
    off, best = (_errors(x, numbers(made, call["scale_format"])) for made in (got, want))
    size = x.square().sum(-1).nan_to_num(0.0, 0.0, 0.0)
    worse = off > best * (1 + 1e-3) + size * 1e-9
    if worse.any():
        return f"{int(worse.count_nonzero())} blocks are further from the rows than they need be"
    pairs = zip(got[:2], want[:2], strict=True)
    codes, scales = ((mine != his).reshape(*best.shape, -1).any(-1) for mine, his in pairs)
    share = float((codes | scales).double().mean())
    return None if share <= 0.02 + 1 / best.numel() else f"{share:.1%} of the blocks differ"


def _errors(x: Tensor, values: Tensor) -> Tensor:
    return (values.reshape(x.shape) - x).square().sum(-1).nan_to_num(0.0, 0.0, 0.0)


def _linear(call: Call, got: Tensor, want: Tensor) -> str | None:
    # the sums cancel: a result is smaller than what was added up
    return _rows(got, want, 16 * SUMS + ROUNDING[want.dtype] * (2 if _written(call) else 1))


def _written(call: Call) -> bool:
    """Whether weights may be rounded to the type of x before they are multiplied."""
    x = call.values[0]
    fewest = FEWEST_POINTS if call.operator == "linear.points" else FEWEST_ROWS
    return call.operator != "linear.codes" and x.dtype in HALVES and rows_of(x) >= fewest


def _embedding(call: Call, got: Tensor, want: Tensor) -> str | None:
    return _same_kind(got, want) or (None if torch.equal(got, want) else "rows differ")


_RULES: dict[str, Callable[[Call, Any, Any], str | None]] = {
    "hadamard": _hadamard,
    "quantize_rows": _quantize_rows,
    "quantize_blocks": _quantize_blocks,
    "linear.real": _linear,
    "linear.codes": _linear,
    "linear.points": _linear,
    "linear.blocks": _linear,
    "linear.experts": _linear,
    "linear_fours": _linear,
    "linear.real_low_rank": _linear,
    "linear.codes_low_rank": _linear,
    "embedding": _embedding,
}
