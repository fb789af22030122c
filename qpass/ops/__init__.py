"""The operators of qpass: each one's plain PyTorch definition is its specification."""

from qpass.ops.attention import attention
from qpass.ops.bits import from_bits, row_bytes, to_bits
from qpass.ops.blocks import BlocksLinear, linear_blocks, pack_blocks, quantize_blocks
from qpass.ops.embedding import embedding
from qpass.ops.experts import PackedExperts, linear_experts, pack_experts
from qpass.ops.fake_quantize import as_read, fake_quantize
from qpass.ops.fours import linear_fours
from qpass.ops.fused import GATES
from qpass.ops.hadamard import hadamard
from qpass.ops.linear import linear_codes, linear_real
from qpass.ops.low_rank import linear_codes_low_rank, linear_real_low_rank
from qpass.ops.packing import PackedLinear, pack_linear
from qpass.ops.points import PointsLinear, linear_points
from qpass.ops.quantize import as_integers, integer_rows, plain_rows, quantize_rows

__all__ = [
    "GATES",
    "BlocksLinear",
    "PackedExperts",
    "PackedLinear",
    "PointsLinear",
    "as_integers",
    "as_read",
    "attention",
    "embedding",
    "fake_quantize",
    "from_bits",
    "hadamard",
    "integer_rows",
    "linear_blocks",
    "linear_codes",
    "linear_codes_low_rank",
    "linear_experts",
    "linear_fours",
    "linear_points",
    "linear_real",
    "linear_real_low_rank",
    "pack_blocks",
    "pack_experts",
    "pack_linear",
    "plain_rows",
    "quantize_blocks",
    "quantize_rows",
    "row_bytes",
    "to_bits",
]
