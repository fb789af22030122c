"""Which modules can be replaced: those that do nothing but one product or one look-up."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, fx, nn

from qpass.analyze import Matmul, find_matmuls, find_tables
from qpass.ir import Owner, Permute, Program, read
from qpass.targets.convolved import has_hooks, unturnable
from qpass.targets.crossing import inside
from qpass.targets.guard import is_guarded
from qpass.targets.layers import RotatedLinear
from qpass.targets.stored import stored_axis

aten = torch.ops.aten

# what may stand around the product: the same numbers in another shape or float type
_SHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.to.dtype,
    aten.sym_size.int,
)

# how far a module may lie from the plain product, relative to the largest entry of the result: the
# sums run in another order
PROBE_LIMIT = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
}
PROBE_ROWS = 3


def refusals(model: nn.Module, program: Program) -> dict[str, str]:
    """For each product or look-up whose module cannot be replaced, by use: the reason."""
    nodes = _nodes_by_module(program)
    matmuls = find_matmuls(program)
    cores: dict[Owner | None, set[str]] = {}
    for matmul in matmuls:
        cores.setdefault(program.owners.get(matmul.use), set()).add(matmul.node)
    found: dict[str, str] = {}
    for matmul in matmuls:
        owner = program.owners.get(matmul.use)
        if owner is not None and _rotated(model, owner):
            continue
        why = _structure(model, program, matmul.use, cores[owner], nodes)
        why = why or _linear(model, program, matmul)
        if why is not None:
            found[matmul.use] = why
    uses = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for use in find_tables(program):
        why = _structure(model, program, use, {n.name for n in uses[use].users}, nodes)
        why = why or _table(model, program, use)
        if why is not None:
            found[use] = why
    found |= unturnable(model, program, nodes, PROBE_LIMIT)
    return _spread(program, found, [*(m.use for m in matmuls), *find_tables(program)])


def _spread(program: Program, refused: dict[str, str], uses: list[str]) -> dict[str, str]:
    """Refuse every product of a module of which one is refused: nothing takes its place."""
    modules = {use: program.owners[use].module for use in uses if use in program.owners}
    why = {modules[use]: reason for use, reason in refused.items() if use in modules}
    return {use: why[path] for use, path in modules.items() if path in why} | refused


def _rotated(model: nn.Module, owner: Owner) -> bool:
    return isinstance(model.get_submodule(owner.module), RotatedLinear)


def _nodes_by_module(program: Program) -> dict[str, list[fx.Node]]:
    found: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            for path in read.module_stack(node):
                found.setdefault(path, []).append(node)
    return found


def _structure(
    model: nn.Module,
    program: Program,
    use: str,
    core: Set[str],
    nodes: Mapping[str, list[fx.Node]],
) -> str | None:
    """Why the graph, or the module's own state, says that the module does more than `core`."""
    owner = program.owners.get(use)
    if owner is None or owner.module == "":
        return "it is computed in the model's own forward"
    for node in nodes.get(owner.module, []):
        if node.name not in core and not read.calls(node, *_SHAPES):
            return f"{owner.module} also computes {read.target_name(node)}"
    inside = {node.name for node in nodes.get(owner.module, [])}
    uses = (program.node(u) for u, o in program.owners.items() if o.module == owner.module)
    if not core <= inside or any(user.name not in inside for u in uses for user in u.users):
        return f"the weight of {owner.module} is also used outside of it"
    module = model.get_submodule(owner.module)
    if next(module.children(), None) is not None:
        return f"{owner.module} has submodules"
    held = {name for name, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    used = {o.attribute for o in program.owners.values() if o.module == owner.module}
    if left := held - used:
        return f"{owner.module} also holds {', '.join(sorted(left))}"
    if "forward" in vars(module) and not is_guarded(module):
        return f"the forward of {owner.module} has been replaced"
    if has_hooks(module):
        return f"{owner.module} has hooks; register them after qpass has run"
    return None


def _linear(model: nn.Module, program: Program, matmul: Matmul) -> str | None:
    owner = program.owners[matmul.use]
    axis = stored_axis(owner, matmul.reads)
    if axis is None or not all(isinstance(step, Permute) for step in owner.prefix):
        return f"{owner.path} is changed before it is used"
    module = model.get_submodule(owner.module)
    weight = _stored(module, owner)
    weight_nk = weight if axis == 1 else weight.mT
    bias = None
    if matmul.bias is not None:
        held = program.owners.get(matmul.bias)
        if held is None or held.module != owner.module:
            return f"{owner.module} adds a bias that it does not hold"
        bias = _stored(module, held)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, weight_nk.shape[1], generator=generator, dtype=torch.float64)
    x = x.to(weight.device, weight.dtype)
    want = nn.functional.linear(x, weight_nk, bias)
    return _differs(owner, module, x, want)


def _table(model: nn.Module, program: Program, use: str) -> str | None:
    owner = program.owners[use]
    module = model.get_submodule(owner.module)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"{owner.module} renormalises its rows when they are read (max_norm)"
    if owner.prefix:
        return f"{owner.path} is changed before it is used"
    table = _stored(module, owner)
    indices = torch.arange(min(PROBE_ROWS, len(table)), device=table.device)
    return _differs(owner, module, indices, table[indices])


def _differs(owner: Owner, module: nn.Module, given: Tensor, want: Tensor) -> str | None:
    with torch.no_grad(), inside():
        got: object = module(given)
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return f"{owner.module} does not return the product alone"
    if want.is_meta:
        return None
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
    if not float(error) <= PROBE_LIMIT[want.dtype]:
        return f"{owner.module} does not compute a plain product (differs by {float(error):.0e})"
    return None


def _stored(module: nn.Module, owner: Owner) -> Tensor:
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return held[owner.attribute].detach()
