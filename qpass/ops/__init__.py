"""The operators of qpass: each one's plain PyTorch definition is its specification."""

from qpass.ops.attention import attention
from qpass.ops.embedding import embedding
from qpass.ops.hadamard import hadamard
from qpass.ops.linear import linear_codes, linear_real
from qpass.ops.packing import PackedLinear, from_nibbles, pack_linear, to_nibbles
from qpass.ops.quantize import quantize_rows

__all__ = [
    "PackedLinear",
    "attention",
    "embedding",
    "from_nibbles",
    "hadamard",
    "linear_codes",
    "linear_real",
    "pack_linear",
    "quantize_rows",
    "to_nibbles",
]
