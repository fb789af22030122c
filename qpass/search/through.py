"""Gradients through a whole program, with the values and weights of one stretch in memory.

Each stretch is run again when gradients come back to it, from what was alive before it. Weights
are made where they are read, so what they are made from gets its gradients too. Roundings are
passed by `fake`, straight through and to the extremes that make the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import cast, final

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from qpass.calibrate.backward import Stretch, stretches
from qpass.ir import Program, fresh, last_uses, run_node

# makes the weight that a use reads, or None for the program's own
Made = Callable[[str], Tensor | None]


@final
class Through:
    """A program in stretches of a few of its `products`, by name.

    Products read in `narrow`, if given: a floating type that is faster to multiply in.
    """

    def __init__(
        self, program: Program, products: Collection[str], narrow: torch.dtype | None = None
    ) -> None:
        self._program = program
        self._parts = stretches(program, products)
        self._last = last_uses(program.graph)
        self._narrow = narrow

    def outputs(self, inputs: Sequence[object], made: Made) -> tuple[object, ...]:
        """What the program returns, with gradients to all that `made` makes weights from.

        Under `no_grad` without, and then nothing is kept for them.
        """
        values: dict[fx.Node, object] = dict(zip(self._program.inputs, fresh(inputs), strict=True))
        after = [part.alive for part in self._parts[1:]] + [self._program.outputs]
        with self._narrowed():
            for part, wanted in zip(self._parts, after, strict=True):
                values = self._passed(part, values, wanted, made)
        return tuple(values[node] for node in self._program.outputs)

    def _narrowed(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self._narrow, enabled=self._narrow is not None)

    def _passed(
        self,
        part: Stretch,
        values: Mapping[fx.Node, object],
        wanted: Sequence[fx.Node],
        made: Made,
    ) -> dict[fx.Node, object]:
        """The values that are wanted after a stretch."""

        def run(*given: object) -> tuple[object, ...]:
            env = dict(zip(part.alive, given, strict=True))
            weights: dict[fx.Node, Tensor] = {}

            def load(node: fx.Node) -> object:
                if self._program.weight(node) is None:
                    return env[node]
                if node not in weights:
                    weight = made(node.name)
                    weights[node] = self._program.value(node) if weight is None else weight
                return weights[node]

            for node in part.nodes:
                env[node] = run_node(node, load, gradients=True)
                for dead in self._last.get(node, ()):
                    env.pop(dead, None)
            return tuple(load(node) for node in wanted)

        given = [values[node] for node in part.alive]
        if torch.is_grad_enabled():
            found = checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            found = run(*given)
        return dict(zip(wanted, cast("tuple[object, ...]", found), strict=True))
