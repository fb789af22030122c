"""qpass: a PyTorch compiler pass that makes transformers smaller and faster."""

import logging

from qpass.api import inspect, quantize, rotate
from qpass.errors import QpassError
from qpass.evaluation import evaluate
from qpass.export import export_onnx, onnx_parity
from qpass.hf.checkpoint import load, save
from qpass.hf.hook import announce
from qpass.plan import Plan, Recipe

# from here on `from_pretrained` of transformers reads what `save` writes
announce()
# silent until the application asks: without a handler, warnings would go to stderr
logging.getLogger("qpass").addHandler(logging.NullHandler())

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
