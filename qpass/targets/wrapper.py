"""Whether the calls between operators are compiled as well, as C++ instead of Python."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from torch import fx

from qpass.ir import read

# a call costs microseconds less from C++, which only a graph of one token notices; compiling it
# takes a tenth of a second and more for each product
FEW_ROWS = 8
MANY_PRODUCTS = 48

# settings of inductor; built apart from its kernels, the C++ needs no optimization
AS_CPP: Mapping[str, object] = MappingProxyType(
    {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
)


def writes_tokens(nodes: Iterable[fx.Node]) -> bool:
    """Whether a graph has many products, all of few rows, as when a language model decodes."""
    rows = [_rows(node.all_input_nodes[0]) for node in nodes if _is_product(node)]
    return len(rows) >= MANY_PRODUCTS and all(m is not None and m <= FEW_ROWS for m in rows)


def _is_product(node: fx.Node) -> bool:
    op = read.operator(node)
    return op is not None and op._schema.name.startswith("qpass::linear")


def _rows(x: fx.Node) -> int | None:
    """The rows of a value `[..., features]`; None where they are not fixed."""
    shape = read.static_shape(x)
    return None if shape is None else math.prod(shape[:-1])
