"""qpass: a PyTorch compiler pass that makes transformers smaller and faster."""

from qpass.api import inspect, quantize, rotate
from qpass.errors import QpassError
from qpass.export import export_onnx, onnx_parity
from qpass.hf.checkpoint import load, save
from qpass.plan import Plan, Recipe
from qpass.verify.quality import evaluate

__all__ = [
    "Plan",
    "QpassError",
    "Recipe",
    "evaluate",
    "export_onnx",
    "inspect",
    "load",
    "onnx_parity",
    "quantize",
    "rotate",
    "save",
]
