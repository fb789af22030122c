"""Where in a module a transform can stand: before a product, and before a module that only reads.

The input of a linear layer is turned by the layer that takes its place. The input of another module
is turned back by a module around it, if it is the only value that the module is given, and what it
returns is turned, if that is one value and all that read it want it so. The channels of a
convolution are turned by a module around its own.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import fx, nn

from qpass.analyze import channels_turned, find_convolutions, find_inputs, find_matmuls
from qpass.errors import Unsupported
from qpass.ir import Program, read
from qpass.rotations import Transform
from qpass.targets.channels import TurnedChannels
from qpass.targets.convolved import has_hooks
from qpass.targets.guard import is_guarded
from qpass.targets.layers import Fixed
from qpass.targets.numbers import by_name
from qpass.targets.record import record_of
from qpass.targets.replaceable import refusals
from qpass.targets.replacing import held, transform_of
from qpass.targets.turned import Turned
from qpass.transform.turn import turn_of

Seam = tuple[str, str, bool]


def find_seams(
    model: nn.Module, program: Program, refused: Container[str], held: Collection[str] = ()
) -> frozenset[Seam]:
    """The edges at which the modules of `model` can hold a transform; see `Program.seams`.

    `refused` are the uses of weights whose modules cannot be replaced, `held` those of weights that
    are read by stand-ins.
    """
    matmuls, modules = find_matmuls(program), _modules(model)
    owned = {program.owners[m.use].module for m in matmuls if m.use in program.owners}
    found = {
        (m.value, m.node, False)
        for m in matmuls
        if m.use not in refused and m.use in program.owners
    }
    inputs = find_inputs(program) if held else {}
    found |= {(m.value, m.node, False) for use in held for m in inputs[use]}
    for path, nodes in _by_module(program).items():
        given = {
            (value, node)
            for node in nodes
            for value in node.all_input_nodes
            if value not in nodes and program.weight(value) is None and read.is_floating(value)
        }
        if path in owned or not _may_stand_around(model, modules, path):
            continue
        if len(given) == 1:
            ((value, node),) = given
            found.add((value.name, node.name, True))
        made = [node for node in nodes if any(user not in nodes for user in node.users)]
        if len(made) == 1 and nodes.isdisjoint(made[0].users):
            found.add((made[0].name, "", False))
    return frozenset(found)


def holds_turns(model: nn.Module, before: Program, after: Program) -> bool:
    """Whether modules can stand around all that are turned: not where a norm's gain has moved."""
    try:
        build_around(model, before, after)
    except Unsupported:
        return False
    return True


def build_around(model: nn.Module, before: Program, after: Program) -> dict[str, nn.Module]:
    """A module to stand around each one that gets or gives something turned, by path."""
    turns: dict[str, list[Transform | None]] = {}
    for node in after.graph.nodes:
        if (turn := turn_of(node)) is None:
            continue
        if turn.inverse:
            transform = by_name(turn.transform, turn.value)
            for path in {read.module_path(user) for user in node.users}:
                turns.setdefault(path, [None, None])[0] = transform
        elif turn.made:
            path = read.module_path(after.node(turn.value))
            turns.setdefault(path, [None, None])[1] = by_name(turn.transform, turn.value)
    modules, made = _modules(model), dict[str, nn.Module]()
    for path, turn in _turned_channels(model, before, after).items():
        module = model.get_submodule(path)
        made[path] = turn.around(module, _dtype(model, module))
    for path, (back, onward) in turns.items():
        changed = [
            owner.path
            for use, owner in before.owners.items()
            if owner.module == path
            and path not in made
            and after.weights.get(use) != before.weights[use]
        ]
        if changed or not _may_stand_around(model, modules, path):
            raise Unsupported(
                f"{path or 'the model'}: its input or output cannot be turned\n"
                "  leave the regions that it reads and makes unrotated"
            )
        module = model.get_submodule(path)
        inner = made.get(path, module)
        made[path] = Turned(inner, back, onward, _dtype(model, module))
    return made


@final
@dataclass(frozen=True, slots=True)
class _Channels:
    """How the channels of a convolution are turned."""

    transform: Transform
    axis: int
    groups: int
    transposed: bool

    def around(self, module: nn.Module, dtype: torch.dtype) -> TurnedChannels:
        """The module that turns what a convolution is given."""
        return TurnedChannels(
            module,
            self.transform,
            dtype,
            axis=self.axis,
            groups=self.groups,
            transposed=self.transposed,
        )


def _turned_channels(model: nn.Module, before: Program, after: Program) -> dict[str, _Channels]:
    """The convolutions whose channels a pass turns, by the path of their modules."""
    found: dict[str, _Channels] = {}
    uses: dict[str, str] = {}
    for convolution in find_convolutions(after):
        owner = after.owners.get(convolution.use)
        node = channels_turned(after, convolution)
        transform = None if node is None else transform_of(after, node)
        if transform is None or owner is None:
            continue
        axis, transposed = convolution.channel, convolution.reads == 0
        named = by_name(transform, owner.module)
        turn = _Channels(named, axis, convolution.groups, transposed)
        if found.setdefault(owner.module, turn) != turn:
            raise Unsupported(
                f"{owner.module}: is called twice and would have to differ between its calls\n"
                "  leave its input unrotated"
            )
        uses[convolution.use] = owner.module
    refused = refusals(model, before) if found else {}
    for use, path in uses.items():
        if (why := refused.get(use)) is not None:
            raise Unsupported(
                f"{path}: no module can be put around it: {why}\n  leave its input unrotated"
            )
    return found


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _by_module(program: Program) -> dict[str, set[fx.Node]]:
    """The nodes that each module computes itself."""
    found: dict[str, set[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (path := read.module_path(node)):
            found.setdefault(path, set()).add(node)
    return found


def _may_stand_around(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> bool:
    # nodes that no module computes are said to come from paths that do not exist
    module = modules.get(path)
    if module is None or module is model or isinstance(module, Fixed):
        return False
    record = record_of(model)
    added = any(name.startswith(f"{path}.") for name in (*record.folded, *record.biases))
    replaced = "forward" in vars(module) and not is_guarded(module)
    leaf = next(module.children(), None) is None
    return leaf and not added and not replaced and not has_hooks(module)


def _dtype(model: nn.Module, module: nn.Module) -> torch.dtype:
    """What a module computes in: the type of its tensors, or of the model's where it has none."""
    own = [t for t in held(module).values() if t is not None and t.is_floating_point()]
    return (own or [p for p in model.parameters() if p.is_floating_point()])[0].dtype
