"""Triton's interpreter with the arithmetic of bfloat16 and the casts to small floats done by torch.

As it comes, it adds and multiplies the bits of bfloat16 numbers as integers and truncates where
hardware rounds. Importing this module repairs it for the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle

# types whose numbers numpy does not know: what torch calls them, and the integers that hold them
_SMALL: dict[Any, tuple[torch.dtype, Any, torch.dtype]] = {
    tl.bfloat16: (torch.bfloat16, np.uint16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8, torch.uint8),
}
_WIDE = (tl.float16, tl.float32, tl.float64)


def _decoded(bits: Any, dtype: Any) -> Any:
    """Numbers of a small type as float32."""
    if dtype not in _SMALL:
        return bits
    name, held, _ = _SMALL[dtype]
    raw = torch.from_numpy(np.ascontiguousarray(bits).view(held))
    return raw.view(name).float().numpy().reshape(np.shape(bits))


def _encoded(values: Any, dtype: Any) -> Any:
    """Numbers rounded to a small type, to nearest, ties to even, as the integers that hold them."""
    name, _, held = _SMALL[dtype]
    wide = torch.from_numpy(np.ascontiguousarray(values).astype(np.float32))
    return wide.to(name).contiguous().view(held).numpy().reshape(np.shape(values))


def _is_small(handle: Any) -> bool:
    return isinstance(handle, _Handle) and handle.dtype.scalar in _SMALL


def _cast(before: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, to: Any, *rest: Any) -> Any:
        given, wanted = source.dtype.scalar, to.scalar
        if given not in _SMALL and wanted not in _SMALL:
            return before(self, source, to, *rest)
        values = _decoded(source.data, given)
        if wanted in _SMALL:
            return _Handle(_encoded(values, wanted), wanted)
        return _Handle(values.astype(interpreter._get_np_dtype(to)), wanted)

    return cast


def _binary(before: Callable[..., Any]) -> Callable[..., Any]:
    def binary(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        if not (_is_small(left) or _is_small(right)):
            return before(self, left, right, op)
        found = op(_decoded(left.data, left.dtype.scalar), _decoded(right.data, right.dtype.scalar))
        if found.dtype == np.bool_:
            return _Handle(found, tl.int1)
        return _Handle(_encoded(found, left.dtype.scalar), left.dtype.scalar)

    return binary


def _unary(before: Callable[..., Any]) -> Callable[..., Any]:
    def unary(self: Any, value: Any, op: Callable[..., Any]) -> Any:
        if not _is_small(value):
            return before(self, value, op)
        dtype = value.dtype.scalar
        return _Handle(_encoded(op(_decoded(value.data, dtype)), dtype), dtype)

    return unary


def _dot(before: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if not (_is_small(a) or _is_small(b)):
            return before(self, a, b, total, *rest)
        product = np.matmul(_decoded(a.data, a.dtype.scalar), _decoded(b.data, b.dtype.scalar))
        return _Handle(product + total.data, total.dtype.scalar)

    return dot


def _scale(before: Callable[..., Any]) -> Callable[..., Any]:
    """Scales of blocks may be E4M3 numbers, which it takes for powers of two."""

    def scale(handle: Any, compute_type: Any) -> Any:
        if handle.dtype.scalar is not tl.float8e4nv:
            return before(handle, compute_type)
        return _decoded(handle.data, tl.float8e4nv)

    return scale


def _repair() -> None:
    read = "_dot_scaled_scale_to_f32"
    setattr(interpreter, read, _scale(getattr(interpreter, read)))
    for name, repaired in (
        ("cast_impl", _cast),
        ("create_fp_to_fp", _cast),
        ("binary_op", _binary),
        ("unary_op", _unary),
        ("create_dot", _dot),
    ):
        setattr(_Builder, name, repaired(getattr(_Builder, name)))


_repair()
