"""The last step of a linear layer whose columns were shared out: partial sums, in a fixed order."""

# m rows of x, n outputs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def finish_linear(
    partial, row_scales, scales, bias, out, m, n, SHARES: tl.constexpr, BN: tl.constexpr
):
    """Store `sum over s of partial[s, i, j] * row_scales[j] * scales[i] + bias[j]`."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    real = j < n
    total = tl.load(partial + i * n + j, mask=real, other=0)
    for s in tl.static_range(1, SHARES):
        total += tl.load(partial + (s * m + i) * n + j, mask=real, other=0)
    y = total.to(tl.float32) * tl.load(row_scales + j, mask=real, other=0.0)
    if scales is not None:
        y *= tl.load(scales + i)
    if bias is not None:
        y += tl.load(bias + j, mask=real, other=0.0).to(tl.float32)
    tl.store(out + i * n + j, y.to(out.dtype.element_ty), mask=real)


def finish(
    partial: Tensor, row_scales: Tensor, scales: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    """Fill `out` from partial sums `[shares, m, n]`, int32 or float32."""
    shares, m, n = partial.shape
    finish_linear[(m, triton.cdiv(n, 256))](
        partial, row_scales, scales, bias, out, m, n, SHARES=shares, BN=256, num_warps=2
    )
