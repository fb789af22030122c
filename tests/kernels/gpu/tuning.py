"""Which configurations of a kernel are worth timing for a call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from qpass.runtime.gpu import Call

Run = Callable[[Call], Any]
Configuration = tuple[str, Run]


def configurations(kernel: str, call: Call) -> Iterator[Configuration]:
    """Names, and functions that serve a call with them."""
    sources = {
        "hadamard_tensor": _rows,
        "quantize_rows_tensor": _rows,
        "linear_real_vector": _vector,
        "linear_real_matrix": _real,
        "linear_codes_matrix": _codes,
    }
    if kernel in sources:
        yield from sources[kernel](call)


def _rows(call: Call) -> Iterator[Configuration]:
    from qpass._kernels.gpu import rows_tensor

    for stages, resident in itertools.product((1, 2, 3), (1, 2, 3, 4)):
        yield (
            f"stages {stages} resident {resident}",
            lambda c, s=stages, r=resident: rows_tensor.run(c, s, r),
        )


def _vector(call: Call) -> Iterator[Configuration]:
    from qpass._kernels.gpu import linear_real_vector

    for outputs, lines, warps, shares, ahead in itertools.product(
        (8, 16), (64, 128, 256), (4, 8, 16), (1, 2, 4), (False, True)
    ):
        if lines <= 32 * warps:
            share = linear_real_vector.Share(outputs, lines, warps, shares, ahead)
            yield str(share), lambda c, s=share: linear_real_vector.run(c, s)


def _matrix(module: Any, call: Call, candidates: Any) -> Iterator[Configuration]:
    from qpass._kernels.gpu.packed import Packed
    from qpass._kernels.gpu.tiles import fit

    fitted = [fit(tile, Packed.of(call).group_lines, call.target) for tile in candidates]
    for tile, shares in itertools.product(fitted, (1, 2, 4)):
        yield f"{tile} shares {shares}", lambda c, v=(tile, shares): module.run(c, *v)


def _real(call: Call) -> Iterator[Configuration]:
    from qpass._kernels.gpu import linear_real_matrix

    scaled = call["group_scales"] is not None
    tiles = linear_real_matrix.candidates(call["bits"], scaled, call["x"].dtype)
    yield from _matrix(linear_real_matrix, call, tiles)


def _codes(call: Call) -> Iterator[Configuration]:
    from qpass._kernels.gpu import linear_codes_matrix

    tiles = linear_codes_matrix.candidates(call["bits"], call["group_scales"] is not None)
    yield from _matrix(linear_codes_matrix, call, tiles)
