"""Static scales of channels that cost nothing: all of them move into what is around a product.

A grid with one step for each channel is one with a single step after each channel was divided by
its own; the division is absorbed by the norm or the weights that make the channel, the
multiplication by the weights that read it, before these are rounded.
Wang et al., MergeQuant: Accurate 4-bit Static Quantization of Large Language Models by Channel-wise
Calibration, 2025 (step migration), and Wang et al., OutlierTune: Efficient Channel-Wise
Quantization for Large Language Models, 2024. Not built of the first: its splitting of channels
whose steps are large; of the second: its shift of channels to the middle of their range.
"""

from __future__ import annotations

from qpass.plan.chooser import CHOOSERS
from qpass.search.smooth import Smooth

# the whole step, or part of it where weights would suffer
CHOOSERS.add(Smooth("migrate", (1.0, 0.85, 0.7, 0.5), balance=False))
