"""A program on many batches at once, stopped wherever a value is to be looked at.

Every operator runs once for each batch; between stops only the values that something later reads
are kept. So the memory is that of the live values of all batches and of the weights between two
stops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast, final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.formats import QuantSpec
from qpass.ir import Program, fresh, last_uses, run_node
from qpass.ops import as_read

# the weight that a use stands for (None: as the program has it)
Replaced = Callable[[str], Tensor | None]


@final
class Stream:
    """The values of `program` on `batches`, in its own floating types, up to where it was stopped.

    Uses of weights are read through `replaced`; the inputs of products in `activations` are
    quantized as their weights' readers will quantize them.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Sequence[object]],
        replaced: Replaced,
        activations: Mapping[str, QuantSpec],
    ) -> None:
        self._program = program
        self._replaced = replaced
        self._nodes: list[fx.Node] = list(program.graph.nodes)
        self._at = 0
        self._position = {node.name: at for at, node in enumerate(self._nodes)}
        self._last = last_uses(program.graph)
        self._reads = {
            m.node: (m, activations[m.use]) for m in find_matmuls(program) if m.use in activations
        }
        # graphs count the tokens of a cache in their inputs, and the data may be used again
        self._values: list[dict[fx.Node, object]] = [
            dict(zip(program.inputs, fresh(batch), strict=True)) for batch in batches
        ]

    def advance(self, to: str) -> list[Tensor]:
        """Run every batch until the value `to` exists, and return it for each of them."""
        end = self._position[to] + 1
        segment = self._nodes[self._at : end]
        self._at = max(self._at, end)
        weights: dict[fx.Node, Tensor] = {}
        with torch.no_grad():
            for values in self._values:
                self._run(segment, values, weights)
        node = self._program.node(to)
        return [cast("Tensor", values[node]) for values in self._values]

    def _run(
        self,
        segment: Sequence[fx.Node],
        values: dict[fx.Node, object],
        weights: dict[fx.Node, Tensor],
    ) -> None:
        quantized: dict[tuple[fx.Node, QuantSpec], Tensor] = {}
        for node in segment:
            if node.op != "call_function":
                continue
            matmul, spec = self._reads.get(node.name, (None, None))

            def load(
                of: fx.Node, matmul: Matmul | None = matmul, spec: QuantSpec | None = spec
            ) -> object:
                if self._program.weight(of) is not None:
                    return self._weight(of, weights)
                if matmul is None or spec is None or of.name != matmul.value:
                    return values[of]
                if (of, spec) not in quantized:
                    quantized[of, spec] = as_quantized(cast("Tensor", values[of]), spec)
                return quantized[of, spec]

            values[node] = run_node(node, load)
            for dead in self._last.get(node, ()):
                values.pop(dead, None)

    def _weight(self, node: fx.Node, weights: dict[fx.Node, Tensor]) -> Tensor:
        if node not in weights:
            found = self._replaced(node.name)
            value = self._program.value(node) if found is None else found
            weights[node] = value
        return weights[node]


def as_quantized(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """The numbers that a product computes with instead of `x`, in the type of `x`."""
    return x if spec is None else as_read(x, spec).to(x.dtype)
