"""In which precision scales are stored."""

from qpass.formats.scales.base import SCALES, ScaleFormat

__all__ = ["SCALES", "ScaleFormat"]
