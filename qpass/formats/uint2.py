"""UINT2: the codes of asymmetric 2-bit grids, 0 to 3."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

UINT2 = FORMATS.add(Integers("uint2", bits=2, first=0, last=3))
