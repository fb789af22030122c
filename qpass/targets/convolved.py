"""Which convolutions may have a module around their own, that turns the channels they read.

All that it takes is that their module is given these channels, and does nothing with them but
convolve: what it makes of the result is its own affair.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from qpass.analyze import Convolution, channels_turned, find_convolutions
from qpass.ir import Block, ChangeBasis, Owner, Program, read
from qpass.rotations import Transform
from qpass.targets.crossing import inside
from qpass.targets.guard import is_guarded
from qpass.targets.trees import floats

_REQUIRED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def unturnable(
    model: nn.Module,
    program: Program,
    nodes: Mapping[str, list[fx.Node]],
    limits: Mapping[torch.dtype, float],
) -> dict[str, str]:
    """For each convolution whose channels cannot be turned around its module, by use: the reason.

    `nodes` are those of each module by path, `limits` say how far results may differ, relative to
    their largest entry.
    """
    convolutions = find_convolutions(program)
    chains: dict[Owner | None, set[str]] = {}
    for convolution in convolutions:
        chains.setdefault(program.owners.get(convolution.use), set()).update(
            _chain(program, convolution)
        )
    found: dict[str, str] = {}
    for convolution in convolutions:
        if channels_turned(program, convolution) is not None:
            continue
        owner = program.owners.get(convolution.use)
        if owner is None or owner.module == "":
            found[convolution.use] = "it is computed in the model's own forward"
            continue
        held = {node.name for node in nodes.get(owner.module, [])}
        why = _structure(model, program, convolution, owner, chains[owner], held)
        why = why or _differs(model.get_submodule(owner.module), program, convolution, limits)
        if why is not None:
            found[convolution.use] = why
    return found


def given_name(module: nn.Module) -> str:
    """What a module calls its first argument: the channels."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def _chain(program: Program, convolution: Convolution) -> list[str]:
    """A convolution, and what its module pads between the channels that it is given and it."""
    found, node = [convolution.node], program.node(convolution.reader)
    while node.name != convolution.node:
        found.append(node.name)
        (node,) = node.users
    return found


def _structure(
    model: nn.Module,
    program: Program,
    convolution: Convolution,
    owner: Owner,
    chain: Set[str],
    held: Set[str],
) -> str | None:
    """Why the graph, or the module's own state, says that it does more with its channels."""
    if owner.prefix:
        return f"{owner.path} is changed before it is used"
    uses = [program.node(use) for use, o in program.owners.items() if o.path == owner.path]
    if not chain <= held or any(user.name not in chain for use in uses for user in use.users):
        return f"{owner.path} is also used for something else"
    if convolution.value in held:
        return f"{owner.module} makes what it convolves"
    readers = [user for user in program.node(convolution.value).users if user.name in held]
    if any(read.fake(user) is not None and user.name not in chain for user in readers):
        return f"{owner.module} does not only convolve what it is given"
    module = model.get_submodule(owner.module)
    if next(module.children(), None) is not None:
        return f"{owner.module} has submodules"
    if "forward" in vars(module) and not is_guarded(module):
        return f"the forward of {owner.module} has been replaced"
    if has_hooks(module):
        return f"{owner.module} has hooks; register them after qpass has run"
    parameters = list(inspect.signature(module.forward).parameters.values())
    given = [p for p in parameters if p.kind in _REQUIRED]
    if not given or any(p.default is p.empty for p in given[1:]):
        return f"{owner.module} has other arguments than what it convolves"
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _differs(
    module: nn.Module,
    program: Program,
    convolution: Convolution,
    limits: Mapping[torch.dtype, float],
) -> str | None:
    """Why a module does not undo for its weight what happens to its channels, or None."""
    owner = program.owners[convolution.use]
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weight = tensors[owner.attribute].detach()
    if weight.is_meta or convolution.width == 1:
        return None
    transform = Transform("hadamard", convolution.width)
    step = ChangeBasis(transform, convolution.reads, convolution.block)
    absorbed = {owner.attribute: step.apply(weight.double(), {}).to(weight.dtype)}
    # one image will do
    shape = read.shape(program.node(convolution.value))[convolution.channel :]
    generator = torch.Generator().manual_seed(0)
    sizes = [read.hint(size) for size in shape]
    x = torch.randn(1, *sizes, generator=generator, dtype=torch.float64)
    channels = Block(0, (convolution.groups, convolution.width), (convolution.width, 1))
    turned = ChangeBasis(transform, 1, channels).apply(x, {})
    with torch.no_grad(), inside():
        want = floats(module(x.to(weight.dtype)))
        result: Any = functional_call(module, absorbed, (turned.to(weight.dtype),))
    for got, wanted in zip(floats(result), want, strict=True):
        error = _distance(got, wanted)
        if not error <= limits[wanted.dtype]:
            return f"{owner.module} does not compute a plain convolution (differs by {error:.0e})"
    return None


def _distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    largest = want.double().abs().max().clamp(min=1e-30)
    return float((got.double() - want.double()).abs().max() / largest)
