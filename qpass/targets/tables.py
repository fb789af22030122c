"""A table of rows that are looked up, held as integers."""

# V rows, D entries of one

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from qpass.ops import embedding
from qpass.targets.crossing import gated
from qpass.targets.fixed import Quantized
from qpass.targets.tensors import Shapes


@final
class QuantizedEmbedding(Quantized):
    """Rows `codes[i] * scales[i]` of a table of int8 codes `[V, D]`, which it keeps as they are."""

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(dtype)
        self.num_embeddings, self.embedding_dim = codes.shape
        # the row of a padding index is a row like any other; only its gradient would differ
        self.padding_idx = padding_idx
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("scales", scales.contiguous(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """A copy of the table as numbers, `[V, D]`."""
        return (self.codes.float() * self.scales.unsqueeze(1)).to(self.dtype)

    @gated
    def forward(self, indices: Tensor) -> Tensor:
        return embedding(indices, self.codes, self.scales, self.dtype)

    def canonical(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "row_scales": self.scales}

    def expected(self) -> Shapes:
        v, d = self.num_embeddings, self.embedding_dim
        return {"codes": ((v, d), torch.int8), "row_scales": ((v,), torch.float32)}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        self.register_buffer("codes", tensors["codes"].clone(), persistent=False)
        self.register_buffer("scales", tensors["row_scales"].clone(), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
