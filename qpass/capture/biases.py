"""Which modules would not add a bias that they are given."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from qpass.ir import Program, read

# a bias that is ignored moves the result by about one
_LIMIT = 1e-2


def find_rigid(program: Program, model: nn.Module) -> frozenset[str]:
    """The paths of the modules whose weights are used in a way that a new bias would not reach.

    Those are all but linear layers that compute their product in their own `forward` and then add
    whatever bias they hold.
    """
    found: set[str] = set()
    for node in program.graph.nodes:
        owner = program.owners.get(node.name)
        if node.op != "placeholder" or owner is None or owner.module in found:
            continue
        module = model.get_submodule(owner.module)
        own = all(_inside(user, owner.module) for user in node.users)
        if not own or not isinstance(module, nn.Linear) or not _adds_bias(module):
            found.add(owner.module)
    return frozenset(found)


def _inside(user: fx.Node, path: str) -> bool:
    return read.module_path(user) == path


def _adds_bias(module: nn.Linear) -> bool:
    if module._parameters.get("bias") is not None or (
        type(module) is nn.Linear and "forward" not in vars(module)
    ):
        return True
    biased = copy.copy(module)
    biased._parameters = dict(module._parameters)
    weight = module.weight
    generator = torch.Generator(device="cpu").manual_seed(0)
    x, bias = (
        torch.randn(n, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)
        for n in (module.in_features, module.out_features)
    )
    biased._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    try:
        difference: object = biased(x[None]) - module(x[None])
    except Exception:  # noqa: BLE001  the module's own code runs and may raise anything
        return False
    if not isinstance(difference, torch.Tensor) or difference.is_meta:
        return False
    return difference.shape == (1, len(bias)) and bool(
        ((difference - bias).abs() <= _LIMIT * bias.abs().max()).all()
    )
