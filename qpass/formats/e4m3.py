"""E4M3: floats of 8 bits up to 448, without infinities.

FP8 Formats for Deep Learning (2022); OCP 8-bit Floating Point Specification, version 1.0 (2023).
"""

from qpass.formats.base import FORMATS
from qpass.formats.floats import Floats

E4M3 = FORMATS.add(Floats("e4m3", bits=8, mantissa=3, bias=7, last=0x7E))
