"""UINT4: the codes of asymmetric 4-bit grids, 0 to 15."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

UINT4 = FORMATS.add(Integers("uint4", bits=4, first=0, last=15))
