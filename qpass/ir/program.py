"""The one thing passes read and write: a float graph, and the weights it uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor, fx

from qpass.errors import BadInput
from qpass.ir import pieces
from qpass.ir.run import last_uses, run_nodes, widened
from qpass.ir.weights import Step, Weight


@final
@dataclass(frozen=True, slots=True)
class Owner:
    """Where a use of a weight lives in the module: a submodule's path and its attribute.

    `prefix` are the leading steps of the use's `Weight` that the module's own code applies to the
    stored tensor (a transpose, `1 + w`); write-back inverts them.
    """

    module: str
    attribute: str
    prefix: tuple[Step, ...] = ()

    @property
    def path(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


@final
@dataclass(slots=True, eq=False)
class Program:
    """A pre-dispatch ATen graph whose placeholders are inputs and *uses* of weights.

    A tensor used twice has two placeholders, so each use can change on its own; two uses whose
    `Weight` values end equal share storage again. Placeholders that are not in `weights` are the
    inputs, in order. Sources are shared with the model and never written to. `rigid` are the paths
    of the modules that would not add a bias which they do not have yet. `seams` are the only places
    where a transform can stand (None: anywhere): a value, who reads it, and whether the value is
    turned back there. `elsewhere` are the paths of the modules that do not run in the graph, where
    it holds only parts of a model. `fixed` are the sources that code makes, and may make again.
    """

    graph: fx.Graph
    weights: dict[str, Weight]
    sources: Mapping[str, Tensor]
    owners: dict[str, Owner]
    rigid: frozenset[str] = frozenset()
    seams: frozenset[tuple[str, str, bool]] | None = None
    elsewhere: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    _named: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node], init=False, repr=False)

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The placeholders that the caller fills."""
        return tuple(
            n for n in self.graph.nodes if n.op == "placeholder" and n.name not in self.weights
        )

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values the graph returns, flat and without constants."""
        return tuple(self.graph.output_node().all_input_nodes)

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        found = self._named.get(name)
        if found is None or found._erased or found.name != name:
            # the graph has changed since names were last looked up
            self._named = {node.name: node for node in self.graph.nodes}
            found = self._named[name]
        return found

    def site(self, use: str) -> str:
        """What a use of a weight is called in plans: where it lives in the module."""
        owner = self.owners.get(use)
        return use if owner is None else owner.path

    def weight(self, node: object) -> Weight | None:
        """The weight that `node` is a use of, or None."""
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return None
        return self.weights.get(node.name)

    def clone(self) -> Program:
        """Copy the graph, with the same names; share the sources."""
        weights, owners = dict(self.weights), dict(self.owners)
        rest = self.rigid, self.seams, self.elsewhere, self.fixed
        return Program(copy(self.graph), weights, self.sources, owners, *rest)

    def lint(self) -> None:
        """Raise unless the graph is well formed and every weight is a placeholder of it."""
        self.graph.lint()
        names = {n.name for n in self.graph.nodes if n.op == "placeholder"}
        if missing := self.weights.keys() - names:
            raise AssertionError(f"weights without a placeholder: {sorted(missing)}")

    def run(
        self,
        *inputs: object,
        widen: bool = False,
        watch: Callable[[fx.Node, object], None] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        gradients: bool = False,
    ) -> tuple[object, ...]:
        """Evaluate the graph and return its outputs, flat. It runs where its inputs are.

        `widen` computes in float64 with every floating cast widened, which is what makes exactness
        measurable in models that cast to float32 inside. `watch` sees each value as it is made.
        `weights` are values of uses that take the place of their own, `gradients` lets those of
        the outputs flow back to them.
        """
        expected = self.inputs
        if len(inputs) != len(expected):
            raise BadInput(f"the graph takes {len(expected)} inputs, got {len(inputs)}")
        given = dict(zip(expected, inputs, strict=True))
        env: dict[fx.Node, object] = {
            node: widened(value) if widen else value for node, value in given.items()
        }
        device = next((i.device for i in inputs if isinstance(i, Tensor)), None)

        def load(_: fx.Node | None, node: fx.Node) -> object:
            if self.weight(node) is not None:
                if weights is not None and node.name in weights:
                    return weights[node.name]
                value = self.value(node, widen=widen)
                return value if device is None else value.to(device)
            return env[node]

        def made(node: fx.Node, value: object) -> object:
            if watch is not None:
                watch(node, value)
            return value

        with torch.set_grad_enabled(gradients):
            run_nodes(
                self.graph.nodes,
                env,
                load,
                # what is returned is read by the last node, which is no call
                last_uses(self.graph),
                widen=widen,
                gradients=gradients,
                device=device,
                made=made,
                instead=self._large if widen and weights is None else None,
            )
            return tuple(load(None, node) for node in self.outputs)

    def value(self, node: fx.Node, *, widen: bool = False) -> Tensor:
        """The weight that `node` is a use of, in the type that the graph reads or float64."""
        weight = self.weights[node.name]
        if widen:
            return weight.evaluate(self.sources)
        return pieces.as_type(weight, self.sources, cast("Tensor", node.meta["val"]).dtype)

    def _large(self, node: fx.Node, load: Callable[[fx.Node], object]) -> object:
        return pieces.product(node, self.weight, self.sources, load)

    def text(self) -> str:
        """A stable print: same graph, same text, on every machine and version."""
        ids: dict[fx.Node, str] = {}
        lines: list[str] = []
        inputs = self.inputs
        for node in self.graph.nodes:
            if node.op == "output":
                lines.append("return " + ", ".join(ids[n] for n in node.all_input_nodes))
                continue
            ids[node] = f"%{len(ids)}"
            if (weight := self.weights.get(node.name)) is not None and node.op == "placeholder":
                steps = "".join(f" . {type(step).__name__}" for step in weight.steps)
                lines.append(f"{ids[node]} = weight {weight.source or 'new'}{steps}")
            elif node.op == "placeholder":
                lines.append(f"{ids[node]} = input {inputs.index(node)}")
            else:
                args = [str(fx.map_arg(a, lambda n: _Id(ids[n]))) for a in node.args]
                args += [
                    f"{k}={fx.map_arg(v, lambda n: _Id(ids[n]))}" for k, v in node.kwargs.items()
                ]
                lines.append(f"{ids[node]} = {_op_name(node.target)}({', '.join(args)})")
        return "\n".join(lines) + "\n"


def copy(graph: fx.Graph) -> fx.Graph:
    """An independent graph with the same nodes, names and metadata."""
    new = fx.Graph()
    output = new.graph_copy(graph, {}, return_output_node=True)
    returned, old = cast("tuple[Any, fx.Node]", output)
    new.output(returned).meta = dict(old.meta)
    for made, node in zip(new.nodes, graph.nodes, strict=True):
        made.meta = dict(node.meta)
    return new


class _Id(str):
    """A value name that prints without quotes, at any depth."""

    __slots__ = ()
    __repr__ = str.__str__


def _op_name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return cast("str", getattr(target, "__name__", repr(target)))
