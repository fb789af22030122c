"""Gradients at values of a program, with one stretch of it and one batch in memory at a time.

The program runs forward without gradients and keeps what is alive at a few cuts. Then, from the
last stretch to the first, each runs again with gradients and hands on those of what it was given.
So the memory is that of the kept values of all batches, and of the weights and values of one
stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, fx

from qpass.ir import Program, fresh, last_uses, read, run_nodes

# of the values asked for, in one stretch
TOGETHER = 16

# what the outputs of one batch, given in its order, come to: a number to start from
Form = Callable[[int, Sequence[object]], Tensor | None]
Values = dict[fx.Node, object]


def gradients_at(
    program: Program, wanted: Collection[str], batches: Sequence[Sequence[object]], form: Form
) -> Iterator[tuple[str, Tensor]]:
    """The gradient of `form` at each value of `wanted`, by name, from the last to the first.

    Those of one value come in the order of the batches, zeros where the form does not depend on it.
    Nothing comes where gradients cannot start from the form of any batch.
    """
    parts, last = stretches(program, wanted), last_uses(program.graph)
    kept = _forward(program, parts, last, batches)
    flowing: list[dict[fx.Node, Tensor]] = [{} for _ in batches]
    for part in reversed(parts):
        weights = _Weights(program)
        for at, starts in enumerate(kept.pop()):
            run = _Rerun(part, starts, weights, last, wanted)
            if part is parts[-1]:
                start = form(at, [run.value(node) for node in program.outputs])
                if start is None or not start.requires_grad:
                    return
                ends: list[tuple[Tensor, Tensor | None]] = [(start, None)]
            else:
                ends = [(cast("Tensor", run.value(n)), g) for n, g in flowing[at].items()]
            found, flowing[at] = run.back(ends)
            yield from found.items()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Nodes that run one after another, and the values before them that are still read."""

    nodes: tuple[fx.Node, ...]
    alive: tuple[fx.Node, ...]


def stretches(program: Program, wanted: Collection[str]) -> list[Stretch]:
    """A program cut where some wanted values have been made; in one if it writes to values."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    cuts = [0]
    if not any(map(read.writes, nodes)):
        last = last_uses(program.graph)
        # a value of several tensors is not cut off from what takes it apart
        open_: set[fx.Node] = set()
        since = 0
        for at, node in enumerate(nodes):
            if since >= TOGETHER and not open_:
                cuts.append(at)
                since = 0
            since += node.name in wanted
            if isinstance(node.meta.get("val"), list | tuple):
                open_.add(node)
            open_.difference_update(last.get(node, ()))
    found: list[Stretch] = []
    read_later = dict.fromkeys(program.outputs)
    for start, end in reversed([*zip(cuts, [*cuts[1:], len(nodes)], strict=True)]):
        part = nodes[start:end]
        read_later |= dict.fromkeys(n for node in part for n in node.all_input_nodes)
        own = set(part)
        alive = [n for n in read_later if n not in own and program.weight(n) is None]
        found.append(Stretch(tuple(part), tuple(alive)))
        read_later = dict.fromkeys(alive)
    return found[::-1]


@final
class _Weights:
    """The weights of one stretch, each evaluated once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: dict[fx.Node, Tensor] = {}

    def get(self, node: fx.Node) -> Tensor | None:
        if self._program.weight(node) is None:
            return None
        if node not in self._known:
            self._known[node] = self._program.value(node)
        return self._known[node]


def _forward(
    program: Program,
    parts: Sequence[Stretch],
    last: Mapping[fx.Node, Sequence[fx.Node]],
    batches: Sequence[Sequence[object]],
) -> list[list[Values]]:
    """What is alive before each stretch, for each batch."""
    now: list[Values] = [dict(zip(program.inputs, fresh(b), strict=True)) for b in batches]
    kept: list[list[Values]] = []
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        kept.append([{n: values[n] for n in part.alive} for values in now])
        if after is None:
            break
        weights = _Weights(program)
        for at, values in enumerate(now):
            env = dict(values)
            with torch.no_grad():
                _run(part.nodes, env, weights, last)
            now[at] = {n: env[n] for n in after.alive}
    return kept


def _run(
    nodes: Sequence[fx.Node],
    env: Values,
    weights: _Weights,
    last: Mapping[fx.Node, Sequence[fx.Node]],
    made: Callable[[fx.Node, object], object] | None = None,
) -> None:
    """Run `nodes`, with gradients where `made` replaces what they make."""

    def load(_: fx.Node, of: fx.Node) -> object:
        weight = weights.get(of)
        return env[of] if weight is None else weight

    if made is None:
        run_nodes(nodes, env, load, last)
    else:
        run_nodes(nodes, env, load, last, gradients=True, made=made)


@final
class _Rerun:
    """One stretch on one batch, with gradients to what was alive before it and what is wanted."""

    def __init__(
        self,
        part: Stretch,
        starts: Mapping[fx.Node, object],
        weights: _Weights,
        last: Mapping[fx.Node, Sequence[fx.Node]],
        wanted: Collection[str],
    ) -> None:
        self._leaves = {
            node: value.detach().requires_grad_()
            for node, value in starts.items()
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        }
        self._weights = weights
        self._wanted: dict[str, Tensor] = {}
        # operators may write to values, but not to leaves
        whole = {n: leaf.clone() for n, leaf in self._leaves.items()}
        self._env: Values = {**starts, **whole}

        def made(node: fx.Node, value: object) -> object:
            if node.name not in wanted or not isinstance(value, Tensor):
                return value
            self._wanted[node.name] = value if value.requires_grad else _leaf(value)
            return self._wanted[node.name]

        with torch.enable_grad():
            _run(part.nodes, self._env, weights, last, made)

    def value(self, node: fx.Node) -> object:
        weight = self._weights.get(node)
        return self._env[node] if weight is None else weight

    def back(
        self, ends: Sequence[tuple[Tensor, Tensor | None]]
    ) -> tuple[dict[str, Tensor], dict[fx.Node, Tensor]]:
        """The gradients at what is wanted, and at what the stretch was given."""
        ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
        inputs = [*self._wanted.values(), *self._leaves.values()]
        if ends and inputs:
            starts, flowing = zip(*ends, strict=True)
            found = torch.autograd.grad(
                starts, inputs, flowing, allow_unused=True, materialize_grads=True
            )
        else:
            found = tuple(map(torch.zeros_like, inputs))
        count = len(self._wanted)
        return (
            dict(zip(self._wanted, found[:count], strict=True)),
            dict(zip(self._leaves, found[count:], strict=True)),
        )


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
