"""qpass: a PyTorch compiler pass that makes transformers smaller and faster."""

from qpass.api import inspect, quantize, rotate
from qpass.errors import QpassError
from qpass.hf.checkpoint import load, save
from qpass.plan import Plan, Recipe
from qpass.verify.quality import evaluate

__all__ = [
    "Plan",
    "QpassError",
    "Recipe",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "rotate",
    "save",
]
