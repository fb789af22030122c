"""Number formats, and how scales turn their points into tensors."""

from qpass.formats.base import FORMATS, Format, Integers
from qpass.formats.spec import QuantSpec
from qpass.formats.tensor import QuantizedTensor

__all__ = ["FORMATS", "Format", "Integers", "QuantSpec", "QuantizedTensor"]
