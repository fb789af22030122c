"""INT3: -4 to 3."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

INT3 = FORMATS.add(Integers("int3", bits=3, first=-4, last=3, unsigned="uint3"))
