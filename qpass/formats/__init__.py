"""Number formats, and how scales turn their points into tensors."""

from qpass.formats.base import FORMATS, Format
from qpass.formats.floats import Floats
from qpass.formats.integers import Integers
from qpass.formats.scales import SCALES, ScaleFormat
from qpass.formats.spec import QuantSpec
from qpass.formats.static import spanning
from qpass.formats.tensor import QuantizedTensor
from qpass.formats.wide import wide

__all__ = [
    "FORMATS",
    "SCALES",
    "Floats",
    "Format",
    "Integers",
    "QuantSpec",
    "QuantizedTensor",
    "ScaleFormat",
    "spanning",
    "wide",
]
