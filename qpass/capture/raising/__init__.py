"""Idioms that models spell out in small operators, recognised by form and named."""

from qpass.capture.raising.base import RAISINGS, Raising, raise_idioms

__all__ = ["RAISINGS", "Raising", "raise_idioms"]
