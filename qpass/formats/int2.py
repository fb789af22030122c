"""INT2: -2 to 1."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

INT2 = FORMATS.add(Integers("int2", bits=2, first=-2, last=1, unsigned="uint2"))
