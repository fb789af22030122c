"""The last step of a linear layer whose columns were shared out: partial sums, in a fixed order."""

# m rows of x, n outputs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def finish_linear(
    partial, row_scales, scales, bias, low, up, out, m, n, rank,
    SHARES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store `sum over s of partial[s, i, j] * row_scales[j] * scales[i] + bias[j]`.

    And what a branch of low rank adds, the sum of `low[i, r] * up[j, r]`.
    """
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
    if low is not None:
        for r in range(rank):
            one = tl.load(low + i * rank + r).to(tl.float32)
            y += one * tl.load(up + j.to(tl.int64) * rank + r, mask=real, other=0.0).to(tl.float32)
    tl.store(out + i * n + j, y.to(out.dtype.element_ty), mask=real)


def finish(
    partial: Tensor,
    row_scales: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> None:
    """Fill `out` from partial sums `[shares, m, n]`, int32 or float32."""
    shares, m, n = partial.shape
    finish_linear[(m, triton.cdiv(n, 256))](
        partial,
        row_scales,
        scales,
        bias,
        low,
        up,
        out,
        m,
        n,
        0 if up is None else up.shape[1],
        SHARES=shares,
        BN=256,
        num_warps=2,
    )
