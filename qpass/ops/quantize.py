"""How activations become integers: per row, from the row itself, after an optional rotation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ops.hadamard import transformed
from qpass.ops.library import define

# rows below it count as zero, so that the reciprocal of the scale stays finite in float32
SMALLEST_ROW = 2.0**-100


def quantize_rows(
    x: Tensor,
    bits: int,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor]:
    """Symmetric integers `codes` (int8) and float32 `scales [..., 1]` with `x ~ codes * scales`.

    With `a` the row's largest magnitude and `q = 2**(bits-1) - 1`: `scales = a / q` and
    `codes = round(x * (q / a))`, ties to even, in float32. `signs`, `factor` and `power` are those
    of `hadamard`, applied first, in float32, without rounding to the dtype of `x`. A row of zeros
    gets scale 0. A row with a NaN or an infinity gets scale NaN and codes 0, so that everything
    computed from it is NaN.
    """
    return torch.ops.qpass.quantize_rows.default(x, bits, signs, factor, power)


def integer_rows(spec: QuantSpec) -> bool:
    """Whether these operators make activations of `spec`: integers, of one scale for each row."""
    small = spec.integers and 2 <= spec.codes.bits <= 8
    per_token = spec.dynamic and spec.block == "channel" and spec.scale_format == "float32"
    return small and (per_token or spec.static)


def plain_rows(spec: QuantSpec) -> bool:
    """Whether `quantize_rows` alone makes them, by the kernels of every device."""
    return integer_rows(spec) and spec.dynamic and spec.symmetric and spec.clip == 1


def has_offsets(spec: QuantSpec) -> bool:
    """Whether rows of integers of `spec` have offsets that products must add."""
    return spec.zero != 0 or (spec.dynamic and not spec.symmetric)


def rows_call(spec: QuantSpec) -> tuple[OpOverload, tuple[int | float, ...]]:
    """The operator that makes activations of `spec`, and its arguments behind `x`.

    A transform comes behind these. Raises BadInput for a static spec without a scale.
    """
    bits = spec.codes.bits
    if spec.static:
        if spec.scale is None:
            raise BadInput("activations: a static scale is missing; calibrate, or give the scale")
        return torch.ops.qpass.quantize_rows.static, (bits, spec.scale, spec.zero)
    ends = int(spec.codes.low), int(spec.codes.high)
    if not spec.symmetric:
        return torch.ops.qpass.quantize_rows.offset, (*ends, spec.clip)
    if spec.clip != 1:
        return torch.ops.qpass.quantize_rows.clipped, (*ends, spec.clip)
    return torch.ops.qpass.quantize_rows.default, (bits,)


def as_integers(
    x: Tensor,
    spec: QuantSpec,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and offsets `[..., 1]` of the rows of `x`: `x ~ codes * scales + offsets`.

    `spec` has `integer_rows`; symmetric ones have no offsets.
    """
    operator, arguments = rows_call(spec)
    codes, scales, *offsets = operator(x, *arguments, signs, factor, power)
    if offsets:
        return codes, scales, offsets[0]
    return codes, scales, scales * -spec.zero if spec.zero else None


def turned(
    x: Tensor, dtype: torch.dtype, signs: Tensor | None, factor: Tensor | None, power: int
) -> Tensor:
    """`x` in `dtype` after the transform of `hadamard`, where there is one."""
    if (signs is None) != (factor is None):
        raise BadInput("a transform needs both signs and factor; pass both or neither")
    y = x.to(dtype)
    if signs is not None and factor is not None:
        y = transformed(y, signs, factor, power)
    return y


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise BadInput(f"activation codes have 2 to 8 bits, got {bits}")


def _specification(
    x: Tensor, bits: int, signs: Tensor | None = None, factor: Tensor | None = None, power: int = 1
) -> tuple[Tensor, Tensor]:
    _check_bits(bits)
    last = 2 ** (bits - 1) - 1
    return _clipped(x, -last, last, 1.0, signs, factor, power)


def _clipped(
    x: Tensor,
    low: int,
    high: int,
    clip: float,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor]:
    """As without a clip, but the scale is `clip` of the row's largest magnitude over `high`.

    What lies beyond the last codes becomes these; the one below may be a step further away.
    """
    if not (-128 <= low < 0 < high <= 127 and 0 < clip <= 1):
        raise BadInput(f"rows of codes {low} .. {high} clipped at {clip}: not bytes, or no clip")
    y = turned(x, torch.float32, signs, factor, power)
    largest_code = float(high)
    if y.shape[-1] == 0:
        return y.to(torch.int8), y.new_zeros((*y.shape[:-1], 1))
    largest = y.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    counts = finite & (largest >= SMALLEST_ROW)
    largest = largest * clip
    # one division: a number divided by a tensor would round its reciprocal first
    to_codes = torch.full_like(largest, largest_code) / largest
    codes = torch.where(counts, (y * to_codes).round(), 0.0).clamp(low, high)
    scales = torch.where(counts, largest / largest_code, 0.0)
    return codes.to(torch.int8), torch.where(finite, scales, torch.nan)


def _offset(
    x: Tensor,
    low: int,
    high: int,
    clip: float,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from `low` to `high` with `x ~ codes * scales + offsets`.

    A row reaches from its smallest entry to its largest, both times `clip`.
    """
    if not (-128 <= low < high <= 127 and 0 < clip <= 1):
        raise BadInput(f"rows of codes {low} .. {high} clipped at {clip}: not bytes, or no clip")
    y = turned(x, torch.float32, signs, factor, power)
    if y.shape[-1] == 0:
        nothing = y.new_zeros((*y.shape[:-1], 1))
        return y.to(torch.int8), nothing, nothing.clone()
    least, most = y.aminmax(dim=-1, keepdim=True)
    finite = least.isfinite() & most.isfinite()
    largest = torch.maximum(-least, most)
    least, most = (
        torch.where(finite & (largest >= SMALLEST_ROW), end * clip, 0.0) for end in (least, most)
    )
    scales = (most - least) / (high - low)
    offsets = least - scales * low
    safe = torch.where(scales == 0, torch.inf, scales)
    codes = ((torch.where(finite, y, 0.0) - offsets) / safe).round().clamp(low, high)
    return (
        codes.to(torch.int8),
        torch.where(finite, scales, torch.nan),
        torch.where(finite, offsets, torch.nan),
    )


def _static(
    x: Tensor,
    bits: int,
    scale: float,
    zero: int,
    signs: Tensor | None = None,
    factor: Tensor | None = None,
    power: int = 1,
) -> tuple[Tensor, Tensor]:
    """Codes `round(x / scale) + zero` of all `bits`, as ONNX's QuantizeLinear, and the scale.

    So `x ~ (codes - zero) * scales`.
    """
    _check_bits(bits)
    half = 2 ** (bits - 1)
    if not (0 < scale < float("inf") and -half <= zero < half):
        raise BadInput(f"scale {scale} and zero {zero} of {bits}-bit codes: out of their range")
    y = turned(x, torch.float32, signs, factor, power)
    finite = y.isfinite().all(-1, keepdim=True)
    step = torch.full((), scale, dtype=torch.float32, device=y.device)
    codes = torch.where(finite, (y / step).round() + zero, 0.0).clamp(-half, half - 1)
    return codes.to(torch.int8), torch.where(finite, step, torch.nan)


def _two(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _three(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = _two(x)
    return codes, scales, torch.empty_like(scales)


_TURN = "Tensor? signs=None, Tensor? factor=None, int power=1"
_TWO = "(Tensor, Tensor)"

define(f"quantize_rows(Tensor x, int bits, {_TURN}) -> {_TWO}", _specification, _two)
define(
    f"quantize_rows.clipped(Tensor x, int low, int high, float clip, {_TURN}) -> {_TWO}",
    _clipped,
    _two,
)
define(
    f"quantize_rows.offset(Tensor x, int low, int high, float clip, {_TURN})"
    " -> (Tensor, Tensor, Tensor)",
    _offset,
    _three,
)
define(
    f"quantize_rows.static(Tensor x, int bits, float scale, int zero, {_TURN}) -> {_TWO}",
    _static,
    _two,
)
