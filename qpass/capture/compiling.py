"""Which modules dynamo is compiling, and what that says about a traced program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator

from qpass.capture.dynamo import Traced
from qpass.ir import Owner, Program, read


@final
@dataclass(frozen=True, slots=True, eq=False)
class Holder:
    """A module that holds a parameter: its path in the compiled one, and the parameter's name."""

    module: nn.Module
    path: str
    attribute: str


class Compiling:
    """The modules that the frame which dynamo is compiling can see, by the tensors they hold."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self._holders: dict[int, list[Holder]] = {}
        for root in roots:
            for path, module in root.named_modules():
                for name, parameter in module.named_parameters(recurse=False):
                    holder = Holder(module, path, name)
                    self._holders.setdefault(id(parameter), []).append(holder)

    @staticmethod
    def now() -> Compiling:
        """What is being compiled at this moment; nothing, outside of a compilation."""
        try:
            tracer = InstructionTranslator.current_tx()
        except AttributeError:
            return Compiling(())
        seen = [*tracer.output.local_scope.values(), *tracer.output.global_scope.values()]
        roots = {id(value): value for value in seen if isinstance(value, nn.Module)}
        return Compiling(roots.values())

    def holders(self, tensor: object) -> Sequence[Holder]:
        """The modules that hold `tensor`."""
        return self._holders.get(id(tensor), ())

    def training(self, tensors: Iterable[object]) -> bool:
        """Whether a module that holds one of `tensors` is in training mode.

        A mode that the code never asks for leaves no trace: a module switched to it later runs
        the graph that it has.
        """
        return any(h.module.training for tensor in tensors for h in self.holders(tensor))

    def name_owners(self, traced: Traced) -> Traced:
        """Tell uses of a shared parameter apart: each belongs to the module that reads it."""
        program = traced.program
        owners = dict(program.owners)
        for node in program.graph.nodes:
            weight, owner = program.weight(node), owners.get(node.name)
            if weight is None or weight.source is None or owner is None:
                continue
            around = {path for user in node.users for path in read.module_stack(user)}
            tensor = program.sources[weight.source]
            found = [h for h in self.holders(tensor) if h.path in around]
            if len(self.holders(tensor)) > 1 and found:
                deepest = max(found, key=lambda holder: len(holder.path))
                owners[node.name] = Owner(deepest.path, deepest.attribute, owner.prefix)
        named = Program(program.graph, program.weights, program.sources, owners)
        return replace(traced, program=named)
