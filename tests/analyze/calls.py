"""How is one call of an operator, with its tensors, a program that the analysis can read?"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qpass.ir import Ones, Program, Step, Weight, Zeros
from qpass.ir.wide import WIDE


@dataclass(frozen=True, eq=False)
class Call:
    """An operator and its arguments; every tensor among them becomes a use of a weight.

    `neutral` names keyword arguments whose tensor a fold has made all ones or all zeros.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()

    def operands(self) -> list[Tensor]:
        """The tensors, each once."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return list({id(x): x for x in leaves if isinstance(x, Tensor)}.values())

    def run(self, changed: dict[int, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The results, flat, with the operands replaced as told."""
        return tuple(pytree.tree_leaves(self._call(changed or {})))

    def _call(self, changed: dict[int, Tensor]) -> Any:
        # an in-place operator must not write into what the next run reads
        fresh = {id(x): changed.get(id(x), x).clone() for x in self.operands()}
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: fresh[id(x)], (self.args, self.kwargs)
        )
        return WIDE.get(self.operator, self.operator)(*args, **kwargs)

    @functools.cached_property
    def wanted(self) -> tuple[Tensor, ...]:
        """The results for the operands as they are."""
        return self.run()

    @functools.cached_property
    def program(self) -> tuple[Program, list[fx.Node], list[fx.Node]]:
        """The program, the uses (in the order of `operands`) and the results."""
        graph = fx.Graph()
        uses: dict[int, fx.Node] = {}
        for i, operand in enumerate(self.operands()):
            node = graph.placeholder(f"w{i}")
            node.meta["val"] = operand
            uses[id(operand)] = node
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: uses[id(x)], (self.args, self.kwargs))
        made = graph.call_function(self.operator, args, kwargs)
        made.meta["val"] = value = self._call({})
        results = [made] if isinstance(value, Tensor) else list(_pieces(graph, made, value))
        graph.output(tuple(results))
        names = {node.name: Weight(node.name) for node in uses.values()}
        steps: dict[str, type[Step]] = {"weight": Ones, "bias": Zeros}
        for name in self.neutral:
            node = uses[id(self.kwargs[name])]
            names[node.name] = Weight(None, (steps[name](tuple(self.kwargs[name].shape)),))
        sources = {uses[id(x)].name: x for x in self.operands()}
        return Program(graph, names, sources, {}), list(uses.values()), results


def _pieces(graph: fx.Graph, made: fx.Node, value: Sequence[Tensor]) -> Iterator[fx.Node]:
    for i, piece in enumerate(value):
        node = graph.call_function(operator.getitem, (made, i))
        node.meta["val"] = piece
        yield node


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers of that shape in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
