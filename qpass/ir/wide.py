"""What operators compute that PyTorch has no float64 kernel of."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten


def grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Products of matrices group by group; `offs` ends each group of an operand of two axes."""
    if offs is None:
        out = torch.bmm(self, mat2)
    else:
        spans = list(itertools.pairwise([0, *(int(end) for end in offs)]))
        if self.dim() == 2 and mat2.dim() == 3:
            out = self.new_zeros(self.shape[0], mat2.shape[2])
            for matrix, (start, stop) in zip(mat2, spans, strict=True):
                out[start:stop] = self[start:stop] @ matrix
        elif self.dim() == 3:
            out = self.new_zeros(self.shape[1], mat2.shape[1])
            for matrix, (start, stop) in zip(self, spans, strict=True):
                out[:, start:stop] = matrix @ mat2[:, start:stop]
        else:
            out = torch.stack([self[:, start:stop] @ mat2[start:stop] for start, stop in spans])
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


WIDE: dict[object, Callable[..., object]] = {aten._grouped_mm.default: grouped_mm}
