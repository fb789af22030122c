"""Steps of a token and a channel: `t_i^a c_j^(1-a)`, with t and c the largest of row and column.

Liu et al., CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel for
Precise Large Language Model Compression, 2024, with its a = 0.15. Columns are those of the
calibration data; their part is a diagonal that the weights around absorb, as integers cannot be
summed over columns of different steps otherwise. What is left of the row is measured after that,
as `max_j |x_ij| / c_j^(1-a)`: never more than `t_i^a`, so no step is larger than the paper's.
"""

from __future__ import annotations

from qpass.plan.chooser import CHOOSERS
from qpass.search.smooth import Smooth

A = 0.15
CHOOSERS.add(Smooth("cross", (1 - A,), balance=False))
