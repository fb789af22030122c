"""What calibration data says: a program is run on it product by product, each rounded in turn."""

from qpass.calibrate.codes import Codes
from qpass.calibrate.cover import covering
from qpass.calibrate.readings import expect_ranges, with_ranges
from qpass.calibrate.rounded import Calibration, needs_data, round_products
from qpass.calibrate.store import Store, key_of

__all__ = [
    "Calibration",
    "Codes",
    "Store",
    "covering",
    "expect_ranges",
    "key_of",
    "needs_data",
    "round_products",
    "with_ranges",
]
