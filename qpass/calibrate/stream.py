"""A program on many batches at once, stopped wherever a value is to be looked at.

Every operator runs once for each batch; between stops only the values that something later reads
are kept. So the memory is that of the live values of all batches and of the weights between two
stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast, final

import torch
from torch import Tensor, fx

from qpass.analyze import Matmul, find_matmuls
from qpass.formats import QuantSpec
from qpass.ir import Program, fresh, last_uses, run_nodes
from qpass.ops import as_read

# the weight that a use stands for (None: as the program has it)
Replaced = Callable[[str], Tensor | None]
Values = dict[fx.Node, object]
Reads = Mapping[str, tuple[Matmul, QuantSpec]]


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
        self._reads = activations_of(program, activations)
        # graphs count the tokens of a cache in their inputs, and the data may be used again
        self._values: list[Values] = [
            dict(zip(program.inputs, fresh(batch), strict=True)) for batch in batches
        ]

    def advance(self, to: str) -> list[Tensor]:
        """Run every batch until the value `to` exists, and return it for each of them."""
        self._run(self._position[to] + 1)
        node = self._program.node(to)
        return [cast("Tensor", values[node]) for values in self._values]

    def before(self, node: fx.Node) -> list[Values]:
        """Run every batch up to a node, and return what is alive there for each of them."""
        self._run(self._position[node.name])
        return [dict(values) for values in self._values]

    def _run(self, end: int) -> None:
        segment = self._nodes[self._at : end]
        self._at = max(self._at, end)
        weights: dict[fx.Node, Tensor] = {}

        def weight(of: fx.Node) -> Tensor | None:
            if self._program.weight(of) is None:
                return None
            if of not in weights:
                found = self._replaced(of.name)
                weights[of] = self._program.value(of) if found is None else found
            return weights[of]

        with torch.no_grad():
            for values in self._values:
                run_part(segment, values, weight, self._reads, self._last)


def run_part(
    nodes: Iterable[fx.Node],
    values: Values,
    weight: Callable[[fx.Node], Tensor | None],
    reads: Reads,
    last: Mapping[fx.Node, Sequence[fx.Node]],
    *,
    gradients: bool = False,
) -> None:
    """Run a part of a program on `values`, to which what it makes is added.

    `weight` gives the value of a use of one, None for anything else. With `gradients`, they pass
    the rounding of activations as if it were none.
    """
    quantized: dict[tuple[fx.Node, QuantSpec], Tensor] = {}

    def load(node: fx.Node, of: fx.Node) -> object:
        if (found := weight(of)) is not None:
            return found
        matmul, spec = reads.get(node.name, (None, None))
        if matmul is None or spec is None or of.name != matmul.value:
            return values[of]
        if (of, spec) not in quantized:
            quantized[of, spec] = as_quantized(cast("Tensor", values[of]), spec)
        return quantized[of, spec]

    run_nodes(nodes, values, load, last, gradients=gradients)


def activations_of(program: Program, specs: Mapping[str, QuantSpec]) -> Reads:
    """Which products read their inputs quantized, by node; `specs` are by their weights' uses."""
    return {m.node: (m, specs[m.use]) for m in find_matmuls(program) if m.use in specs}


def as_quantized(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """The numbers that a product computes with instead of `x`, in the type of `x`.

    Gradients go on to `x` as they come.
    """
    if spec is None:
        return x
    with torch.no_grad():
        made = as_read(x, spec).to(x.dtype)
    return x + (made - x).detach() if x.requires_grad else made
