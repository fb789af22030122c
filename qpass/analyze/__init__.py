"""Which axes of a program may change basis together, and what holds the others still."""

from qpass.analyze.constraints import Pin, Role
from qpass.analyze.convolutions import Convolution, channels_turned, find_convolutions
from qpass.analyze.ends import find_heads, find_tables
from qpass.analyze.gains import Gain, find_gain
from qpass.analyze.largest import largest_regions
from qpass.analyze.matmuls import Matmul, find_matmuls
from qpass.analyze.meetings import Meeting, find_inputs, find_meetings
from qpass.analyze.regions import Bound, Region, Site, by_name, find_regions
from qpass.analyze.rotatable import rotatable_regions
from qpass.analyze.rules.views import MOVES
from qpass.analyze.solution import Span

__all__ = [
    "MOVES",
    "Bound",
    "Convolution",
    "Gain",
    "Matmul",
    "Meeting",
    "Pin",
    "Region",
    "Role",
    "Site",
    "Span",
    "by_name",
    "channels_turned",
    "find_convolutions",
    "find_gain",
    "find_heads",
    "find_inputs",
    "find_matmuls",
    "find_meetings",
    "find_regions",
    "find_tables",
    "largest_regions",
    "rotatable_regions",
]
