"""INT4: signed nibbles, -8 to 7."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

INT4 = FORMATS.add(Integers("int4", bits=4, first=-8, last=7, unsigned="uint4"))
