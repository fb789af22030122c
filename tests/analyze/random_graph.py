"""Random programs, built operator by operator, so that hundreds take seconds."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qpass.ir import Program, Weight

aten = torch.ops.aten

# few are powers of two, some divide others
WIDTHS = (2, 3, 4, 5, 6, 8, 9, 12)
LARGEST = 2000  # entries of a value
TOO_MUCH = 30.0  # where values are scaled down


class Grown:
    """A program in the making; `choice` decides everything."""

    def __init__(self, choice: random.Random) -> None:
        self.choice = choice
        self.graph = fx.Graph()
        self.program = Program(self.graph, {}, {}, {})
        self.inputs: list[Tensor] = []
        self.values: list[fx.Node] = []
        self._first: fx.Node | None = None
        self._noise = torch.Generator().manual_seed(choice.randrange(2**32))

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._noise)

    def maybe(self, share: float = 0.5) -> bool:
        return self.choice.random() < share

    def width(self) -> int:
        return self.choice.choice(WIDTHS)

    def axis(self, x: fx.Node, *, signed: bool = True) -> int:
        rank = len(shape(x))
        found = self.choice.randrange(rank)
        return found - rank if signed and self.maybe() else found

    def input(self, value: Tensor) -> fx.Node:
        self.inputs.append(value)
        return self._placeholder(f"x{len(self.inputs)}", value)

    def weight(self, *sizes: int, size: float = 0.5) -> fx.Node:
        """A use of a weight: of a new one, or of one that is used elsewhere already."""
        sources = self.program.sources
        assert isinstance(sources, dict)
        same = [n for n, tensor in sources.items() if n[0] == "w" and tensor.shape == sizes]
        name = self.choice.choice(same) if same and self.maybe(0.3) else f"w{len(sources)}"
        tensor = sources.setdefault(name, size * self.noise(*sizes))
        node = self._placeholder(f"use{len(self.program.weights)}", tensor)
        self.program.weights[node.name] = Weight(name)
        return node

    def constant(self, value: Tensor) -> fx.Node:
        """Indices or a mask, which the code itself makes."""
        assert isinstance(self.program.sources, dict)
        name = f"constant{len(self.program.sources)}"
        self.program.sources[name] = value
        node = self._placeholder(name, value)
        self.program.weights[node.name] = Weight(name)
        return node

    def _placeholder(self, name: str, value: Tensor) -> fx.Node:
        if self._first is None:
            node = self.graph.placeholder(name)
        else:
            with self.graph.inserting_before(self._first):
                node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        self._first = self._first or node
        args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*args, **kwargs)
        return node

    def pieces(self, many: fx.Node) -> list[fx.Node]:
        found = []
        for i, piece in enumerate(many.meta["val"]):
            node = self.graph.call_function(operator.getitem, (many, i))
            node.meta["val"] = piece
            found.append(node)
        return found

    def reshape(self, x: fx.Node, *sizes: int) -> fx.Node:
        return self.call(aten.reshape.default, x, list(sizes))

    def another(self, fits: Callable[[fx.Node], bool]) -> fx.Node | None:
        """An earlier value of some kind."""
        found = [v for v in self.values if fits(v)]
        return self.choice.choice(found) if found else None

    def keep(self, value: fx.Node | None) -> None:
        """Let later constructs read a value, if it is one of numbers of a moderate size."""
        if value is None or not isinstance(value.meta["val"], Tensor):
            return
        tensor = value.meta["val"]
        if not tensor.is_floating_point() or not 0 < tensor.numel() <= LARGEST:
            return
        largest = float(tensor.abs().max())
        if not largest < 1e6:
            return
        if largest > TOO_MUCH:
            value = self.call(aten.mul.Tensor, value, 0.03)
        self.values.append(value)


Construct = Callable[[Grown, fx.Node], fx.Node | list[fx.Node] | None]

CONSTRUCTS: dict[str, list[Construct]] = {}


def construct(family: str) -> Callable[[Construct], Construct]:
    """Register what makes values of an earlier one, by the family of rules it is about."""

    def register(function: Construct) -> Construct:
        CONSTRUCTS.setdefault(family, []).append(function)
        return function

    return register


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def split_in_two(n: int, choice: random.Random) -> tuple[int, int]:
    """Two factors of a number, in a random order of size."""
    outer = choice.choice([d for d in range(1, n + 1) if n % d == 0])
    return outer, n // outer


def grow(choice: random.Random, *, focus: str | None = None) -> tuple[Grown, Program]:
    """A random program; where there is a `focus`, every second construct is of that family."""
    g = Grown(choice)
    width, batch, length = g.width(), choice.choice((1, 2)), choice.choice((1, 3, 4, 6))
    ids = g.input(torch.randint(7, (batch, length), generator=g._noise))
    stream = g.call(aten.embedding.default, g.weight(7, width), ids)
    g.keep(stream)
    if g.maybe(0.4):
        g.keep(g.input(g.noise(batch, length, width)))
    families = sorted(CONSTRUCTS)
    for step in range(choice.randint(3, 9)):
        family = focus if focus is not None and step % 2 else choice.choice(families)
        # the newest values most of the time
        x = choice.choice(g.values[-3:] if g.maybe(0.8) else g.values)
        made = choice.choice(CONSTRUCTS[family])(g, x)
        for value in made if isinstance(made, list) else [made]:
            g.keep(value)
    returned = []
    for value in [v for v in g.values if not v.users] or g.values[-1:]:
        # behind a matrix, the last axis is nobody's business
        sizes = shape(value)
        if sizes and sizes[-1] > 1 and g.maybe(0.8):
            value = g.call(aten.linear.default, value, g.weight(3, sizes[-1]))
        returned.append(value)
    g.graph.output(tuple(returned))
    g.program.lint()
    return g, g.program
