"""Importable view of the top-level kernels/ directory: bundled in a wheel, linked in a checkout."""

from pathlib import Path

_checkout = Path(__file__).parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
