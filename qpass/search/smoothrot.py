"""Scales in front of what runs with the model: massive values shrink before they are spread.

Czakó et al., SmoothRot: Combining Channel-Wise Scaling and Rotation for Quantization-Friendly LLMs,
2025. A Hadamard transform turns one massive value into a whole row of large ones; as in the paper
what makes the value takes the scales, its reader their inverse, and the transform comes behind. The
strength is searched region by region, and none is a candidate. `smooth` does this and all others.
"""

from __future__ import annotations

from qpass.plan.chooser import CHOOSERS
from qpass.search.smooth import Smooth

CHOOSERS.add(Smooth("smoothrot", running=True))
