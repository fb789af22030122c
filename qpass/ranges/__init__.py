"""Where the grids of activations end, when data says what these are."""

from qpass.ranges.base import RANGES, Range, Seen

__all__ = ["RANGES", "Range", "Seen"]
