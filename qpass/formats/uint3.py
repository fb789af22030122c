"""UINT3: the codes of asymmetric 3-bit grids, 0 to 7."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

UINT3 = FORMATS.add(Integers("uint3", bits=3, first=0, last=7))
