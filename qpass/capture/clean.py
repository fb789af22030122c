"""Which nodes of a traced graph say nothing and are dropped."""

from __future__ import annotations

import torch
from torch import fx

from qpass.ir import Program, edit, read
from qpass.ir.alias import memory, written_memory

aten = torch.ops.aten

# statements about values that the trace has already relied on
_ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.default,
        aten._assert_async.msg,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._C._set_grad_enabled,
        torch._C._log_api_usage_once,
    }
)

# the same values, perhaps in other memory
_COPIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    }
)

# conversions to a type that is known after tracing
_RETYPES = (
    aten.type_as.default,
    aten.to.dtype_layout,
    aten.to.other,
    aten.to.device,
    aten._to_copy.default,
)

# the same values wherever the argument already has the result's shape and element type
_VIEWS = frozenset({aten.expand.default, aten.reshape.default, aten.to.dtype, aten.slice.Tensor})

_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default})

# each leaves its first argument alone where the second is that number
_NEUTRAL: dict[object, int] = {
    aten.add.Tensor: 0,
    aten.sub.Tensor: 0,
    aten.mul.Tensor: 1,
    aten.div.Tensor: 1,
}


def clean(program: Program) -> None:
    """Drop what does not change the function: assertions, copies, casts and views to the same."""
    for node in list(program.graph.nodes):
        if read.calls(node, aten.detach_.default):
            # a write in name only, to the constants that code makes
            edit.replace(node, read.value(node, "self"))
    written = written_memory(program.graph)
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            if not node.users:
                program.graph.erase_node(node)
            continue
        _normalise(node)
        source = _same_value(node)
        if source is not None and not {memory(node), memory(source)} & written:
            edit.replace(node, source)
    edit.erase_dead(program)


def _normalise(node: fx.Node) -> None:
    """Write views as `reshape` and conversions of the element type as `to.dtype`."""
    if read.calls(node, aten.view.default, aten._unsafe_view.default):
        edit.retarget(
            node, aten.reshape.default, read.value(node, "self"), read.argument(node, "size")
        )
    elif read.calls(node, *_RETYPES):
        source, made = read.value(node, "self"), read.fake(node)
        origin = read.fake(source)
        if made is not None and origin is not None and made.device == origin.device:
            edit.retarget(node, aten.to.dtype, source, made.dtype)


def _same_value(node: fx.Node) -> fx.Node | None:
    """The value that `node` repeats, or None."""
    if node.target in _COPIES:
        # a copy that is returned promises its own memory
        owns = node.target in (aten.clone.default, aten.contiguous.default)
        if owns and any(user.op == "output" for user in node.users):
            return None
        return read.value(node, "self")
    if node.target in _DROPOUTS:
        return None if read.argument(node, "train") else read.value(node, "input")
    if read.calls(node, aten.slice.Tensor) and read.argument(node, "step") != 1:
        return None
    neutral = _NEUTRAL.get(node.target)
    if neutral is not None and read.argument(node, "other") != neutral:
        return None
    if neutral is not None or node.target in _VIEWS:
        source = read.optional_value(node, "self")
        return source if source is not None and read.same_type(source, node) else None
    return None
