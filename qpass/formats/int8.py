"""INT8: signed bytes without -128, so that every code has a negative."""

from qpass.formats.base import FORMATS
from qpass.formats.integers import Integers

INT8 = FORMATS.add(Integers("int8", bits=8, first=-127, last=127))
