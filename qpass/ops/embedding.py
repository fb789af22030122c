"""What a lookup in an embedding table of integers computes."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.ops.library import define


def embedding(indices: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `codes[i] * scales[i]` in `dtype`: codes int8 `[v, d]`, scales float32 `[v]`.

    An index outside `0 .. v-1` raises.
    """
    return torch.ops.qpass.embedding.default(indices, codes, scales, dtype)


def _specification(indices: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rows = codes.shape[0]
    if scales.shape != (rows,):
        raise BadInput(f"the table has {rows} rows but scales has shape {tuple(scales.shape)}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        raise IndexError(f"an index lies outside the table of {rows} rows")
    flat = indices.reshape(-1)
    values = codes.index_select(0, flat).to(torch.float32) * scales.index_select(0, flat)[:, None]
    return values.to(dtype).reshape(*indices.shape, codes.shape[1])


def _shapes(indices: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*indices.shape, codes.shape[1]), dtype=dtype)


define(
    "embedding(Tensor indices, Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    _specification,
    _shapes,
)
