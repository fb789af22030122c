"""A branch of low rank beside a quantized product, in the same registers before they are stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qpass._kernels.gpu.weights import FLOATS, flat
from qpass.errors import BadInput
from qpass.ops.low_rank import check_low_rank
from qpass.runtime.gpu import Call

# numbers of the rank that one product sums over
SLICE = tl.constexpr(16)


@triton.jit
def with_branch(y, low, up, rank, i, j, real_i, real_j):
    """`y[j, i]` and the sum of `up[j, r] * low[i, r]` over the rank."""
    low += i.to(tl.int64) * rank
    up += j.to(tl.int64) * rank
    for start in range(0, rank, SLICE):
        r = start + tl.arange(0, SLICE)
        real = (r < rank)[None, :]
        a = tl.load(up[:, None] + r[None, :], mask=real_j[:, None] & real, other=0.0)
        b = tl.load(low[:, None] + r[None, :], mask=real_i[:, None] & real, other=0.0)
        y = tl.dot(a, tl.trans(b), y, input_precision="ieee")
    return y


def branch(call: Call) -> tuple[Tensor | None, Tensor | None, int]:
    """The rows and the columns of a call's branch, and its rank; none where there is no branch."""
    low, up = call.arguments.get("low"), call.arguments.get("up")
    if low is None or up is None or up.shape[1] == 0:
        return None, None, 0
    return flat(low).contiguous(), up, up.shape[1]


def refuse_branch(call: Call, x: Tensor) -> str | None:
    """Why no kernel adds this branch, or None."""
    low, up = call["low"], call["up"]
    try:
        check_low_rank(x, call["out_features"], low, up)
    except BadInput as error:
        return str(error)
    if low.dtype not in FLOATS:
        return f"the branch is {low.dtype}"
    if low.device != x.device or up.device != x.device or not up.is_contiguous():
        return f"the branch is on {low.device} and {up.device} or not contiguous"
    return None
