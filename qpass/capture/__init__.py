"""From a module, or from the graph that dynamo hands to a backend, to a Program."""

from qpass.capture.call import Captured, Inputs
from qpass.capture.dynamo import Traced, capture_graph
from qpass.capture.export import capture

__all__ = ["Captured", "Inputs", "Traced", "capture", "capture_graph"]
