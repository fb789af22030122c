"""E2M1: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with both signs, the element of MXFP4 and NVFP4.

OCP Microscaling Formats (MX) Specification, version 1.0 (2023).
"""

from qpass.formats.base import FORMATS
from qpass.formats.floats import Floats

E2M1 = FORMATS.add(Floats("e2m1", bits=4, mantissa=1, bias=1, last=0x7))
